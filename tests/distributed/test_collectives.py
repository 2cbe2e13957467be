"""hpcgpt.distributed.collectives and tree: results and errors are shared by all ranks, along a tree of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.distributed import collectives, tree
from tests.one_rank import ALONE
from tests.programs import on_ranks

SIZES = [*range(1, 40), 512, 1000, 4096]


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_but_0_has_one_parent_and_no_rank_has_many_children(size: int) -> None:
    below = {rank: tree.children(rank, size) for rank in range(size)}
    assert sorted(child for of_rank in below.values() for child in of_rank) == list(range(1, size))
    assert all(tree.parent(child) == rank for rank, of_rank in below.items() for child in of_rank)
    assert max(map(len, below.values())) == math.ceil(math.log2(size)) if size > 1 else not below[0]


@pytest.mark.parametrize("size", SIZES)
def test_the_way_to_rank_0_is_short_and_below_a_rank_are_those_that_follow_it(size: int) -> None:
    below = {rank: [rank] for rank in range(size)}
    for rank in reversed(range(1, size)):
        above = tree.parent(rank)
        assert above is not None
        below[above] += below[rank]
    for rank, found in below.items():
        assert sorted(found) == list(range(rank, rank + len(found)))
        way = 0
        above = tree.parent(rank)
        while above is not None:
            way, above = way + 1, tree.parent(above)
        assert way <= math.log2(size) + 1


def test_on_nodes_of_8_ranks_one_message_in_8_crosses_nodes() -> None:
    crossing = [rank for rank in range(1, 4096) if (tree.parent(rank) or 0) // 8 != rank // 8]
    assert len(crossing) == 4096 // 8 - 1


def test_a_single_rank_sends_nothing() -> None:
    assert collectives.run_on_rank0(ALONE, lambda: 7) == 7
    assert collectives.gather_to_rank0(ALONE, lambda: 7) == [7]
    assert collectives.gather_from_all(ALONE, lambda: 7) == [7]
    assert collectives.distinct_on_all(ALONE, lambda: 7) == {7}


@pytest.mark.processes
def test_all_ranks_share_results_and_the_error_of_the_lowest_rank_that_failed(tmp_path: Path) -> None:
    done = on_ranks(5, "tests.distributed.ranks_collectives", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(5)]
    for rank, of_rank in enumerate(found):
        assert of_rank["run"] == "of 0"
        assert of_rank["make"] == (None if rank else 0)
        assert of_rank["to_rank0"] == ([] if rank else [0, 10, 20, 30, 40])
        assert of_rank["from_all"] == [0, 10, 20, 30, 40]
        assert of_rank["merged"] == "0 1 2 3 4 "
        assert of_rank["distinct"] == [0, 1]
        assert of_rank["run_fails"] == ["FileNotFoundError", "[Errno 2] rank 0 fails", 0]
        for name in ("to_rank0_fails", "from_all_fails", "merge_fails"):
            assert of_rank[name] == ["UserError", "rank 1 fails", 1], name
        assert of_rank["large"] == 10_000_000
    # Of a tree and of the ring that gloo uses for gradients: not each to each.
    edges = {frozenset(edge) for edge in [(0, 1), (0, 2), (0, 4), (2, 3), (1, 2), (3, 4)]} | {frozenset({1, 3})}
    assert [of_rank["connections"] for of_rank in found] == [sum(rank in edge for edge in edges) for rank in range(5)]


@pytest.mark.processes
@pytest.mark.parametrize("ending", [0, 2, 4])
def test_the_end_of_a_rank_is_an_error_on_all_others_at_once(ending: int, tmp_path: Path) -> None:
    """Also before anything was sent: gloo would try for ten minutes to connect to a rank that has ended."""
    done = on_ranks(5, "tests.distributed.ranks_collectives", str(tmp_path), str(ending))
    assert done.returncode == 9, done.stderr
    for rank in {*range(5)} - {ending}:
        kind, message, _ = json.loads((tmp_path / f"{rank}.json").read_text())
        if kind != "ConnectionError":  # which rendezvous.connect has made of it: the rank had not connected to all yet
            assert kind == "RuntimeError"
            assert "gloo/transport" in message
