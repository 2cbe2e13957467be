"""hpcgpt.data.loader: any number of ranks gets the same samples in the same global batches."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcgpt.data import sample_order, shard_format, shard_reader, shard_writer
from hpcgpt.data.loader import Loader, Mixture, Windows
from hpcgpt.data.shard_format import Width
from hpcgpt.data.shard_reader import Split
from hpcgpt.training.step import to_ids, to_inputs_and_targets

SEED, GLOBAL_BATCH, CONTEXT = 7, 8, 32


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    split = shard_reader.open_split(shards_folder, shard_format.read_manifest(shards_folder), "train")
    return Windows(split, CONTEXT, CONTEXT, vocab_size=512)


@pytest.fixture(scope="module")
def stream(windows: Windows) -> NDArray[np.int64]:
    """The whole training split, read without the loader."""
    parts = [
        np.fromfile(windows.split.folder / f"{shard.name}.bin", dtype="<u2")[shard_format.HEADER_BYTES // 2 :]
        for shard in windows.split.shards
    ]
    return np.concatenate(parts).astype(np.int64)


@cache
def loader_of(windows: Windows, rank: int, ranks: int, micro_batch: int) -> Loader:
    return Loader(
        mixture=Mixture([windows]),
        seed=SEED,
        rank=rank,
        world_size=ranks,
        global_batch=GLOBAL_BATCH,
        micro_batch=micro_batch,
    )


def global_batch(windows: Windows, step: int, ranks: int, micro_batch: int) -> Tensor:
    """Return what all ranks get of one step (GLOBAL_BATCH, T+1): rank after rank, micro-step after micro-step."""
    seen = []
    for rank in range(ranks):
        for micro_step in range(GLOBAL_BATCH // ranks // micro_batch):
            batch = loader_of(windows, rank, ranks, micro_batch).batch(step, micro_step)
            assert batch.shape == (micro_batch, CONTEXT + 1)
            seen.append(batch)
    return torch.cat(seen)


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 4), (2, 4), (2, 1), (4, 2), (4, 1), (8, 1)])
def test_a_global_batch_is_the_same_however_many_ranks_and_micro_steps_share_it(
    windows: Windows, ranks: int, micro_batch: int
) -> None:
    for step in (0, 1, 5, 1000):
        expected = global_batch(windows, step, ranks=1, micro_batch=8)
        assert torch.equal(global_batch(windows, step, ranks, micro_batch), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_in_an_epoch_exactly_one_rank_gets_each_window_once(
    windows: Windows, stream: NDArray[np.int64], ranks: int
) -> None:
    steps = windows.count // GLOBAL_BATCH
    seen: dict[bytes, int] = {}
    for step in range(steps):
        for window in to_int64(global_batch(windows, step, ranks, GLOBAL_BATCH // ranks)):
            key = window.numpy().tobytes()
            seen[key] = seen.get(key, 0) + 1
    every: dict[bytes, int] = {}
    for window in range(windows.count):
        key = stream[window * CONTEXT : (window + 1) * CONTEXT + 1].tobytes()
        every[key] = every.get(key, 0) + 1
    assert sum(seen.values()) == steps * GLOBAL_BATCH > windows.count - GLOBAL_BATCH
    assert all(count <= every.get(key, 0) for key, count in seen.items())


def test_the_next_epoch_has_another_order(windows: Windows) -> None:
    steps = windows.count // GLOBAL_BATCH
    assert not torch.equal(global_batch(windows, 0, 1, 8), global_batch(windows, steps, 1, 8))


def test_another_seed_has_another_order(windows: Windows) -> None:
    first, other = (
        Loader(mixture=Mixture([windows]), seed=seed, rank=0, world_size=1, global_batch=8, micro_batch=8).batch(0, 0)
        for seed in (1, 2)
    )
    assert not torch.equal(first, other)


def test_a_batch_depends_on_its_number_only(windows: Windows) -> None:
    loader = Loader(
        mixture=Mixture([windows]), seed=SEED, rank=1, world_size=2, global_batch=GLOBAL_BATCH, micro_batch=2
    )
    later = loader.batch(9, 1)
    loader.batch(0, 0)
    assert torch.equal(loader.batch(9, 1), later)
    assert torch.equal(
        Loader(
            mixture=Mixture([windows]), seed=SEED, rank=1, world_size=2, global_batch=GLOBAL_BATCH, micro_batch=2
        ).batch(9, 1),
        later,
    )


@pytest.mark.parametrize("ahead", [1, 6, 50])
def test_how_far_ahead_the_order_is_computed_changes_nothing(
    windows: Windows, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches() -> list[Tensor]:
        loader = Loader(
            mixture=Mixture([windows]), seed=SEED, rank=1, world_size=2, global_batch=GLOBAL_BATCH, micro_batch=2
        )
        return [loader.batch(step, micro_step) for step in [*range(30), 2000, 7] for micro_step in (1, 0)]

    expected = batches()
    monkeypatch.setattr("hpcgpt.data.loader._AHEAD", ahead)
    assert all(map(torch.equal, batches(), expected))


def test_with_fewer_windows_than_a_batch_ahead_at_most_an_epoch_is_computed(tmp_path: Path) -> None:
    """Each epoch has its own permutation: computing thousands of them for one batch would be slow."""
    windows = Windows(split_of(tmp_path, list(range(29))), block_size=4, stride=4, vocab_size=29)
    loader = Loader(mixture=Mixture([windows]), seed=SEED, rank=0, world_size=1, global_batch=7, micro_batch=7)
    assert windows.count == 7
    for step in (0, 1, 12345):
        assert sorted(loader.batch(step, 0)[:, 0].tolist()) == [0, 4, 8, 12, 16, 20, 24]
        assert len(loader._cached_starts(0)) == 7


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_epoch_of_overlapping_windows_contains_each_once(
    windows: Windows, stream: NDArray[np.int64], ranks: int
) -> None:
    overlapping = Windows(windows.split, CONTEXT, 12, 512)
    steps = overlapping.count // GLOBAL_BATCH
    seen = torch.cat([to_int64(global_batch(overlapping, step, ranks, 4)) for step in range(steps)])
    there = sample_order.windows(np.arange(steps * GLOBAL_BATCH), overlapping.count, SEED)
    assert len(set(there.tolist())) == steps * GLOBAL_BATCH > overlapping.count - GLOBAL_BATCH
    expected = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT + 1)[there * 12]
    by_content = (sorted(map(tuple, rows.tolist())) for rows in (seen, expected))
    assert next(by_content) == next(by_content)


def test_targets_are_the_inputs_shifted_by_one(windows: Windows, stream: NDArray[np.int64]) -> None:
    inputs, targets = to_inputs_and_targets(windows.read(np.array([0, 3, windows.count - 1])), torch.device("cpu"))
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (3, CONTEXT)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    for row, window in enumerate([0, 3, windows.count - 1]):
        assert np.array_equal(inputs[row], stream[window * CONTEXT :][:CONTEXT])
        assert np.array_equal(targets[row], stream[window * CONTEXT + 1 :][:CONTEXT])


def test_with_a_smaller_stride_windows_overlap(windows: Windows, stream: NDArray[np.int64]) -> None:
    overlapping = Windows(windows.split, CONTEXT, 5, 512)
    inputs, _ = to_inputs_and_targets(overlapping.read(np.array([7])), torch.device("cpu"))
    assert np.array_equal(inputs[0], stream[35 : 35 + CONTEXT])
    assert overlapping.count == (len(stream) - CONTEXT - 1) // 5 + 1


def test_a_window_may_cross_several_shards(tmp_path: Path) -> None:
    windows = Windows(split_of(tmp_path, [1, 2, 3], [4, 5], [6, 7, 8, 9]), block_size=7, stride=1, vocab_size=10)
    inputs, targets = to_inputs_and_targets(windows.read(np.array([0, 1])), torch.device("cpu"))
    assert inputs.tolist() == [[1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7, 8]]
    assert targets[:, -1].tolist() == [8, 9]
    assert windows.count == 2


def test_ids_above_32767_survive_int16(tmp_path: Path) -> None:
    ids = [0, 1, 32767, 32768, 50256, 65535, 12, 40000]
    windows = Windows(split_of(tmp_path, ids), block_size=7, stride=7, vocab_size=65536)
    inputs, targets = to_inputs_and_targets(windows.read(np.array([0])), torch.device("cpu"))
    assert inputs.tolist() == [ids[:-1]]
    assert targets.tolist() == [ids[1:]]


def test_ids_above_32767_survive_int16_where_the_device_widens_them() -> None:
    ids = to_ids(torch.tensor([[0, 32767, -32768, -1]], dtype=torch.int16))
    assert (ids.tolist(), ids.dtype) == ([[0, 32767, 32768, 65535]], torch.int64)


def test_ids_above_65535_are_read_as_int32(tmp_path: Path) -> None:
    ids = [0, 65535, 65536, 100_000, 2**31 - 1, 1, 7, 40000]
    split = split_of(tmp_path, ids, width=shard_format.WIDTHS["uint32"])
    batch = Windows(split, block_size=7, stride=7, vocab_size=2**31).read(np.array([0]))
    assert batch.dtype == torch.int32
    inputs, targets = to_inputs_and_targets(batch, torch.device("cpu"))
    assert inputs.dtype == torch.int64
    assert inputs.tolist() == [ids[:-1]]
    assert targets.tolist() == [ids[1:]]
    with pytest.raises(ValueError, match=r"id 2147483647 is outside of the vocabulary of 2,147,483,647"):
        Windows(split, block_size=7, stride=7, vocab_size=2**31 - 1).read(np.array([0]))


def test_a_batch_with_more_rows_than_open_shards_is_the_same(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = np.arange(windows.count)[::-1]
    expected = windows.read(chosen)
    monkeypatch.setattr("hpcgpt.data.shard_reader.most_maps", lambda: 10)
    assert torch.equal(windows.read(chosen), expected)


def test_an_id_outside_of_the_vocabulary_names_the_shard_the_token_and_what_to_do(tmp_path: Path) -> None:
    ids = [5] * 40
    ids[29] = 100
    windows = Windows(split_of(tmp_path, ids), block_size=8, stride=8, vocab_size=100)
    assert windows.read(np.array([0, 1, 2])).shape == (3, 9)
    with pytest.raises(ValueError, match=r"id 100 is outside of the vocabulary of 100 ids") as error:
        windows.read(np.array([1, 3]))
    assert f"{tmp_path / 'train_000000'}.bin, token 29" in str(error.value)
    assert "data_prep.verify" in str(error.value)


def test_a_bad_id_in_a_later_shard_is_named_by_its_position_in_that_shard(tmp_path: Path) -> None:
    windows = Windows(split_of(tmp_path, [5] * 10, [5, 5, 600, 5, 5]), block_size=7, stride=7, vocab_size=512)
    with pytest.raises(ValueError, match=r"id 600 .*train_000001\.bin, token 2"):
        windows.read(np.array([1]))


def split_of(folder: Path, *contents: list[int], width: Width = shard_format.WIDTHS["uint16"]) -> Split:
    """Return a split with these ids, one shard each."""
    made = []
    for number, ids in enumerate(contents):
        with shard_writer.writing(folder, f"train_{number:06d}", "train", width) as writer:
            writer.add(np.array(ids, dtype=width.dtype), np.array([len(ids)]), 1, 1)
        assert writer.shard is not None
        made.append(writer.shard)
    return Split(folder, "train", made, width)


def to_int64(batch: Tensor) -> Tensor:
    """Return a batch (B, T+1) of 16-bit patterns as int64."""
    inputs, targets = to_inputs_and_targets(batch, torch.device("cpu"))
    return torch.cat([inputs, targets[:, -1:]], dim=1)
