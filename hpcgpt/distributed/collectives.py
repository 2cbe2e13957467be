"""Collective calls that share results and errors: all ranks continue together, or raise together.

If one rank fails (a full disk, a damaged file), the others must not wait for it in a collective: its error is sent to
them, and raised there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hpcgpt import errors
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError

T = TypeVar("T")


def run_on_rank0(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0; return its result, or raise its error, on every rank."""
    outcome: list[Any] = [_attempt(work, ranks) if ranks.world.is_first else None]
    if ranks.cpu_group is not None:
        dist.broadcast_object_list(outcome, src=0, group=ranks.cpu_group)
    return _results(outcome)[0]  # type: ignore[no-any-return]


def make_on_rank0(ranks: Ranks, make: Callable[[], T]) -> T | None:
    """Call `make` on rank 0 and return the result there, None on the others. Its error is raised on every rank."""
    made: list[T] = []
    run_on_rank0(ranks, lambda: made.append(make()))
    return made[0] if made else None


def gather_from_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; return all results by rank, or raise the error of the lowest rank that failed."""
    outcomes: list[Any] = [_attempt(work, ranks)] * ranks.world.size
    if ranks.cpu_group is not None:
        dist.all_gather_object(outcomes, outcomes[0], group=ranks.cpu_group)
    return _results(outcomes)


def _attempt(work: Callable[[], T], ranks: Ranks) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # of any type: the others must not wait for this rank
        # A library's exception may not be picklable, so its type and message are sent.
        known = isinstance(error, UserError | OSError)
        shared = (
            error if known else RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
        )
        errors.mark(shared, ranks.world.rank)
        return None, shared


def _results(outcomes: list[Any]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]
