"""hpcgpt/estimate/fitting.py: what is tried, in which order, and that only what fits is named."""

from __future__ import annotations

import dataclasses

import pytest

from hpcgpt.config import contradictions
from hpcgpt.config.options import Config, Model, Parallel, Train
from hpcgpt.estimate import analytic, fitting
from hpcgpt.estimate.account import Memory
from hpcgpt.estimate.request import Request

CONFIG = Config(model=Model(vocab_size=50_257), train=Train(micro_batch=16, dtype="bfloat16"))
REQUEST = Request(CONFIG, ranks=8, on_cpu=False, micro_steps=2, saves_while_training=True)


def ask(request: Request) -> Memory:
    return analytic.measure(request, "a test")


def peak(request: Request) -> int:
    return ask(request).peak.total


def test_three_settings_are_named_and_each_fits_by_its_own_estimate() -> None:
    limit = int(0.8 * peak(REQUEST))
    found = fitting.find(ask, REQUEST, limit)
    assert len(found) == fitting.MOST
    for fitting_ in found:
        assert fitting_.memory.peak.total <= limit
        assert peak(fitting.changed(REQUEST, fitting_.changes)) == fitting_.memory.peak.total
    assert found[0].flags == "--train.loss_chunk 4096"  # the cheapest


def test_what_does_not_fit_is_not_named() -> None:
    limit = peak(fitting.changed(REQUEST, {"train.micro_batch": 4}))
    names = [found.flags for found in fitting.find(ask, REQUEST, limit)]
    assert "--train.micro_batch 4" in names
    assert "--train.micro_batch 8" not in names


def test_a_limit_that_nothing_meets_names_nothing() -> None:
    assert fitting.find(ask, REQUEST, 10**6) == []


def test_a_tight_limit_combines_everything() -> None:
    everything = {"parallel.mode": "fsdp", "train.activation_checkpointing": True, "train.loss_chunk": 4096}
    limit = peak(fitting.changed(REQUEST, everything | {"train.micro_batch": 8}))
    (found, *_) = fitting.find(ask, REQUEST, limit)
    assert found.memory.peak.total <= limit
    assert found.cost


def test_no_setting_is_named_beside_a_part_of_it() -> None:
    found = fitting.find(ask, REQUEST, peak(REQUEST))
    for one in found:
        assert not any(one is not other and other.changes.items() <= one.changes.items() for other in found)


def test_the_global_batch_stays() -> None:
    changed = fitting.changed(REQUEST, {"train.micro_batch": 4})
    assert changed.config.train.global_batch == CONFIG.train.global_batch
    assert changed.micro_steps == 2  # at most


def test_what_is_set_already_is_not_proposed() -> None:
    train = dataclasses.replace(CONFIG.train, activation_checkpointing=True, loss_chunk=1024, micro_batch=1)
    request = dataclasses.replace(
        REQUEST, config=dataclasses.replace(CONFIG, train=train, parallel=Parallel(mode="fsdp"))
    )
    assert fitting.find(ask, request, peak(request) - 1) == []


def test_a_single_rank_is_not_told_to_shard() -> None:
    request = dataclasses.replace(REQUEST, ranks=1)
    assert not any("parallel" in found.flags for found in fitting.find(ask, request, int(0.3 * peak(request))))


def test_zero1_with_bfloat16_gradients_is_not_proposed_where_the_plan_refuses_it() -> None:
    config = dataclasses.replace(CONFIG, parallel=Parallel(gradient_dtype="bfloat16"))
    request = dataclasses.replace(REQUEST, config=config)
    tried: list[str] = []

    def recorded(asked: Request) -> Memory:
        tried.append(asked.config.parallel.mode)
        return ask(asked)

    fitting.find(recorded, request, 10**6)
    assert set(tried) == {"ddp", "zero2", "fsdp"}


@pytest.mark.parametrize(("size", "halves"), [(16, [8, 4, 2, 1]), (12, [6, 3, 1]), (5, [1]), (1, [])])
def test_halves_divide(size: int, halves: list[int]) -> None:
    assert list(fitting._halves(size)) == halves


@pytest.mark.parametrize("chunk", [0, 4096, 16_384])
@pytest.mark.parametrize("micro_batch", [2, 3, 6])
def test_no_setting_is_named_that_training_would_refuse(chunk: int, micro_batch: int) -> None:
    """A micro-batch of fewer tokens than train.loss_chunk is refused (hpcgpt.config.contradictions)."""
    chunk = min(chunk, micro_batch * CONFIG.model.block_size)
    train = dataclasses.replace(CONFIG.train, micro_batch=micro_batch, loss_chunk=chunk, global_batch=48)
    request = dataclasses.replace(REQUEST, config=dataclasses.replace(CONFIG, train=train))
    for share in (0.2, 0.4, 0.5, 0.6, 0.8):
        for one in fitting.find(ask, request, int(share * peak(request))):
            assert list(contradictions.find(fitting.with_values(request.config, one.changes))) == [], one.flags
