"""Doing a thing together: every rank learns every other's result, or error, before anyone goes on.

A stage that can fail on one rank (a full disk, a damaged file) must not leave the others waiting in a
collective for somebody who has left. Here the error itself is what is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hpcgpt import errors
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError

T = TypeVar("T")


def on_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Rank 0 does `work`; its result is returned, or its error raised, on every rank."""
    outcome: list[Any] = [_attempt(work, ranks) if ranks.world.is_first else None]
    if ranks.control is not None:
        dist.broadcast_object_list(outcome, src=0, group=ranks.control)
    return _results(outcome)[0]  # type: ignore[no-any-return]


def kept_by_first(ranks: Ranks, make: Callable[[], T]) -> T | None:
    """Rank 0 makes something that stays with it, and has it; None on the others. Its error is raised on every rank."""
    made: list[T] = []
    on_first(ranks, lambda: made.append(make()))
    return made[0] if made else None


def on_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Every rank does `work`; all results by rank, or the first rank's error, on every rank."""
    outcomes: list[Any] = [_attempt(work, ranks)] * ranks.world.size
    if ranks.control is not None:
        dist.all_gather_object(outcomes, outcomes[0], group=ranks.control)
    return _results(outcomes)


def _attempt(work: Callable[[], T], ranks: Ranks) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:  # whatever it is, the others must not wait for this rank
        # Errors of libraries need not survive being sent to another process: of those the words are.
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
