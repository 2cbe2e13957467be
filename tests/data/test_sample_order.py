"""hpcgpt.data.sample_order and hpcgpt.data.loader.Loader: which tokens sample i of a run consists of."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from hpcgpt.data import sample_order, shard_format, shard_reader
from hpcgpt.data.loader import Loader, Mixture, Windows
from tests.data.allocations import peak_of

Ints = NDArray[np.int64]


def drawn_of(first: int, count: int, total: int, seed: int) -> Ints:
    """Return the windows of samples first ... first + count - 1."""
    return sample_order.windows(np.arange(first, first + count), total, seed)


def step_of_rank(step: int, rank: int, ranks: int, batch: int, total: int, seed: int = 1) -> list[int]:
    """Return the windows of one rank's share of a global batch, as hpcgpt.data.loader requests them."""
    share = batch // ranks
    windows: list[int] = drawn_of(step * batch + rank * share, share, total, seed).tolist()
    return windows


SIZES = sorted({1, 2, 3, 5, 7, 10, 100, 1000} | {2**n + d for n in range(2, 13) for d in (-1, 0, 1)})


@pytest.mark.parametrize("total", SIZES)
def test_an_epoch_holds_every_window_exactly_once(total: int) -> None:
    for seed in (0, 1, 2**63 - 1):
        assert sorted(drawn_of(0, total, total, seed)) == list(range(total))


def test_every_epoch_has_another_order() -> None:
    total = 1000
    epochs = [tuple(drawn_of(n * total, total, total, seed=1)) for n in range(20)]
    assert len(set(epochs)) == 20


def test_every_seed_has_another_order() -> None:
    orders = [tuple(drawn_of(0, 1000, 1000, seed)) for seed in range(20)]
    assert len(set(orders)) == 20


def test_no_epoch_of_one_seed_is_an_epoch_of_another_seed() -> None:
    """(seed, epoch) is not folded into one number: seed 1's second epoch is not seed 2's first."""
    first = {(seed, n): tuple(drawn_of(n * 500, 500, 500, seed)) for seed in range(5) for n in range(5)}
    assert len(set(first.values())) == 25


def test_the_order_looks_random() -> None:
    """Few windows keep their position, few neighbours stay neighbours, and the mean position of the first tenth of an
    epoch is the middle of the corpus."""
    total = 10_000
    drawn = drawn_of(0, total, total, seed=1)
    assert np.count_nonzero(drawn == np.arange(total)) < 10
    assert np.count_nonzero(np.abs(np.diff(drawn)) == 1) < 20
    assert abs(float(drawn[: total // 10].mean()) - total / 2) < total / 20


def test_a_sample_is_the_same_alone_and_in_any_batch() -> None:
    total, seed = 97, 3
    together = drawn_of(0, 500, total, seed).tolist()
    assert [int(drawn_of(i, 1, total, seed)[0]) for i in range(500)] == together
    assert np.concatenate([drawn_of(i, 7, total, seed) for i in range(0, 497, 7)]).tolist() == together[:497]


def test_the_order_is_frozen() -> None:
    """A run that was started with one version must continue with the next. Change these rows only if the order is meant
    to change, and then say so in the changelog."""
    assert drawn_of(0, 12, 12, seed=1).tolist() == [2, 1, 5, 3, 11, 6, 10, 4, 0, 7, 8, 9]
    assert drawn_of(10**6, 4, 1000, seed=42).tolist() == [880, 706, 703, 178]
    assert drawn_of(7, 3, 2**50, seed=0).tolist() == [1098155107782491, 945993599896615, 721290025354011]


def test_a_huge_corpus_takes_no_memory() -> None:
    total = 2**50
    drawn = drawn_of(total - 4, 8, total, seed=1)
    assert peak_of(lambda number: drawn_of(total - 4, 8, total, seed=2 + number)) < 100_000
    assert len(set(drawn.tolist())) == 8
    assert drawn.min() >= 0
    assert drawn.max() < total


@pytest.mark.parametrize("total", [2**50, 2**50 + 1, 2**62])
def test_a_huge_corpus_is_shuffled_over_its_whole_length(total: int) -> None:
    drawn = drawn_of(0, 2000, total, seed=5)
    assert len(set(drawn.tolist())) == 2000
    assert np.histogram(drawn, bins=4, range=(0, total))[0].min() > 400


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_shares_are_disjoint_and_add_up_to_the_global_batch(ranks: int) -> None:
    batch, total = 16, 1000
    for step in range(60):  # up to, but not across, the end of the epoch
        shares = [step_of_rank(step, rank, ranks, batch, total) for rank in range(ranks)]
        assert [len(share) for share in shares] == [batch // ranks] * ranks
        together = [*chain(*shares)]
        assert together == drawn_of(step * batch, batch, total, seed=1).tolist()
        assert len(set(together)) == batch


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_window_occurs_once_per_epoch_also_where_a_batch_crosses_epochs(ranks: int) -> None:
    batch, total = 16, 100  # 100 is no multiple of 16: batches cross the border of every epoch
    steps = 3 * total // batch + 1
    samples = [w for step in range(steps) for r in range(ranks) for w in step_of_rank(step, r, ranks, batch, total)]
    for epoch in range(3):
        assert sorted(samples[epoch * total : (epoch + 1) * total]) == list(range(total))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_the_loader_reads_these_windows_whatever_the_ranks_and_the_micro_batch(
    ranks: int, micro_batch: int, shards_folder: Path
) -> None:
    split = shard_reader.open_split(shards_folder, shard_format.read_manifest(shards_folder), "train")
    windows = Windows(split, block_size=32, stride=32, vocab_size=512)
    last = windows.count // 8  # the global batch that crosses into the second epoch
    for step in (0, 1, last):
        batches = [
            Loader(
                mixture=Mixture([windows]), seed=1, rank=rank, world_size=ranks, global_batch=8, micro_batch=micro_batch
            ).batch(step, micro_step)
            for rank in range(ranks)
            for micro_step in range(8 // ranks // micro_batch)
        ]
        expected = [split.read(int(w) * 32, 33).tolist() for w in drawn_of(step * 8, 8, windows.count, seed=1)]
        assert [row for batch in batches for row in (batch.numpy().view(np.uint16)).tolist()] == expected


def test_a_corpus_smaller_than_a_batch_is_repeated_epoch_by_epoch() -> None:
    drawn = drawn_of(0, 10, 3, seed=1).tolist()
    assert [sorted(drawn[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_without_windows_there_is_no_order() -> None:
    with pytest.raises(ValueError, match="without windows"):
        drawn_of(0, 1, 0, seed=1)


# --- windows over the stream -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "count"),
    [
        (0, 8, 8, 0),
        (1, 8, 8, 0),
        (8, 8, 8, 0),
        (9, 8, 8, 1),  # 8 inputs, and one more token for the last target
        (16, 8, 8, 1),
        (17, 8, 8, 2),
        (17, 8, 4, 3),
        (17, 8, 1, 9),
        (2, 1, 1, 1),
        (10**15 + 1, 1000, 1000, 10**12),
    ],
)
def test_the_number_of_windows_is_the_table(tokens: int, context: int, stride: int, count: int) -> None:
    assert sample_order.window_count(tokens, context, stride) == count


def targets(tokens: int, context: int, stride: int) -> Ints:
    """Return how often each token of the stream is a target in one epoch (tokens,)."""
    hits = np.zeros(tokens, dtype=np.int64)
    for window in drawn_of(0, (count := sample_order.window_count(tokens, context, stride)), count, seed=1):
        hits[window * stride + 1 : window * stride + context + 1] += 1
    return hits


@pytest.mark.parametrize("tokens", [9, 15, 16, 17, 100, 1001])
def test_with_stride_equal_to_context_every_target_occurs_once_except_a_short_tail(
    tokens: int,
) -> None:
    context = 8
    hits = targets(tokens, context, context)
    covered = int(hits.sum())
    assert hits[0] == 0  # nothing comes before the first token
    assert hits[1 : covered + 1].tolist() == [1] * covered
    assert 0 <= tokens - 1 - covered < context


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
def test_with_a_smaller_stride_every_target_occurs_except_a_tail_shorter_than_the_stride(stride: int) -> None:
    tokens, context = 100, 8
    hits = targets(tokens, context, stride)
    last = int(np.flatnonzero(hits)[-1])
    assert hits[1 : last + 1].min() >= 1
    assert hits.max() <= -(-context // stride)
    assert tokens - 1 - last < stride
