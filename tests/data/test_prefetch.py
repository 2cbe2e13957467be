"""hpcgpt.data.prefetch: a thread reads batches one ahead, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hpcgpt.data.prefetch import Prefetcher

CPU = torch.device("cpu")


class Shards:
    """A stand-in for the loader: batch (number, micro-step) is full of 100 * number + micro-step. `gate` blocks it."""

    def __init__(self) -> None:
        self.read_by: list[tuple[int, int, str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.reads = threading.Semaphore(0)

    def read(self, number: int, micro_step: int) -> Tensor:
        self.read_by.append((number, micro_step, threading.current_thread().name))
        self.reads.release()
        assert self.gate.wait(60)
        if number == 7:
            raise ValueError("a bad shard")
        return torch.full((2, 5), 100 * number + micro_step, dtype=torch.int16)

    @property
    def positions(self) -> list[tuple[int, int]]:
        return [(number, micro_step) for number, micro_step, _ in self.read_by]


@contextmanager
def prefetching(micro_steps: int = 2) -> Iterator[tuple[Shards, Prefetcher]]:
    shards = Shards()
    yield shards, Prefetcher(shards.read, micro_steps, CPU)
    shards.gate.set()


def values(prefetcher: Prefetcher, number: int) -> list[int]:
    found: list[int] = []
    for batch in prefetcher.batches(number):
        assert (batch.shape, batch.dtype) == ((2, 5), torch.int16)
        found += set(batch.flatten().tolist())
    return found


def test_each_batch_is_the_requested_one() -> None:
    with prefetching() as (_, prefetcher):
        assert [values(prefetcher, number) for number in (0, 1, 2)] == [[0, 1], [100, 101], [200, 201]]


def test_the_next_batch_is_read_before_it_is_requested_and_only_once() -> None:
    with prefetching() as (shards, prefetcher):
        values(prefetcher, 0)
        for _ in range(3):
            assert shards.reads.acquire(timeout=60)
        assert shards.positions == [(0, 0), (0, 1), (1, 0)]
        values(prefetcher, 1)
        assert shards.reads.acquire(timeout=60)
        assert shards.reads.acquire(timeout=60)
        assert shards.positions[3:] == [(1, 1), (2, 0)]
        assert {name for _, _, name in shards.read_by} == {"prefetcher"}


def test_after_a_jump_back_or_ahead_the_batches_are_right() -> None:
    with prefetching() as (_, prefetcher):
        assert values(prefetcher, 5) == [500, 501]
        assert values(prefetcher, 2) == [200, 201]
        assert values(prefetcher, 6) == [600, 601]


def test_a_batch_may_be_used_partly() -> None:
    """The warm-up uses one micro-batch of the first batch."""
    with prefetching() as (_, prefetcher):
        assert [set(batch.flatten().tolist()) for batch in prefetcher.batches(0, 1)] == [{0}]
        assert values(prefetcher, 0) == [0, 1]


def test_an_error_is_raised_where_the_batch_is_used_and_not_before() -> None:
    with prefetching() as (shards, prefetcher):
        assert values(prefetcher, 6) == [600, 601]  # the bad one is being read ahead
        for _ in range(3):
            assert shards.reads.acquire(timeout=60)
        assert shards.positions[-1] == (7, 0)
        assert values(prefetcher, 8) == [800, 801]  # and the bad one is never used
        with pytest.raises(ValueError, match="a bad shard"):
            values(prefetcher, 7)


def test_waited_s_counts_only_waiting() -> None:
    with prefetching(micro_steps=1) as (shards, prefetcher):
        values(prefetcher, 0)
        prefetcher.waited_s()
        for _ in range(2):
            assert shards.reads.acquire(timeout=60)
        shards.gate.clear()
        values(prefetcher, 1)  # read ahead already
        assert shards.reads.acquire(timeout=60)  # the gate blocks batch 2
        free_s = prefetcher.waited_s()
        threading.Timer(0.5, shards.gate.set).start()
        assert values(prefetcher, 2) == [200]
        assert prefetcher.waited_s() > 0.4 > free_s
        assert prefetcher.waited_s() == 0.0
