"""Collective calls that share results and errors: all ranks continue together, or raise together.

If one rank fails (a full disk, a damaged file), the others must not wait for it in a collective: its error is sent to
them, and raised there too.

What is sent grows with the number of ranks N only where results of all ranks are needed::

                        returns                          a rank sends        rank 0 receives
    run_on_rank0        rank 0's result, on every rank   that to <= log2 N   nothing
    gather_to_rank0     all results, on rank 0           those below it      N results
    merge_on_all        one object, merged of all        2 objects and more  <= log2 N objects
    gather_from_all     all results, on every rank       N results           N results
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hpcgpt import errors
from hpcgpt.distributed import tree
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError

T = TypeVar("T")
Outcome = tuple[T | None, Exception | None]  # a result, or an error


def run_on_rank0(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run `work` on rank 0; return its result, or raise its error, on every rank."""
    return _result(tree.down(ranks, _attempt(work, ranks) if ranks.world.is_first else (None, None)))


def make_on_rank0(ranks: Ranks, make: Callable[[], T]) -> T | None:
    """Call `make` on rank 0 and return the result there, None on the others. Its error is raised on every rank."""
    made: list[T] = []
    run_on_rank0(ranks, lambda: made.append(make()))
    return made[0] if made else None


def gather_to_rank0(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; return all results by rank on rank 0, and [] on the others.

    If ranks failed, the error of the lowest of them is raised on every rank.
    """
    results, error = tree.up(ranks, _in_list(_attempt(work, ranks)), _append)
    if (shared := tree.down(ranks, error)) is not None:
        raise shared
    return results if ranks.world.is_first and results is not None else []


def gather_from_all(ranks: Ranks, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; return all results by rank, or raise the error of the lowest rank that failed.

    Every rank receives all results: only for what every rank needs.
    """
    return _result(tree.down(ranks, tree.up(ranks, _in_list(_attempt(work, ranks)), _append)))


def merge_on_all(ranks: Ranks, work: Callable[[], T], merge: Callable[[T, T], T]) -> T:
    """Run `work` on every rank; return the results merged by `merge`, on every rank.

    `merge` gets results of two ranges of ranks, the lower one first. If ranks failed, the error of the lowest of them
    is raised on every rank.
    """

    def merge_outcomes(lower: Outcome[T], higher: Outcome[T]) -> Outcome[T]:
        for outcome in (lower, higher):
            if outcome[1] is not None:
                return outcome
        return merge(lower[0], higher[0]), None  # type: ignore[arg-type]

    return _result(tree.down(ranks, tree.up(ranks, _attempt(work, ranks), merge_outcomes)))


def distinct_on_all(ranks: Ranks, work: Callable[[], T]) -> set[T]:
    """Run `work` on every rank; return the different results, on every rank."""
    return merge_on_all(ranks, lambda: {work()}, set.union)


def _in_list(outcome: Outcome[T]) -> Outcome[list[T]]:
    result, error = outcome
    return ([result], None) if error is None else (None, error)  # type: ignore[list-item]


def _append(lower: Outcome[list[T]], higher: Outcome[list[T]]) -> Outcome[list[T]]:
    if lower[1] is not None or higher[1] is not None:
        return None, lower[1] or higher[1]
    return lower[0] + higher[0], None  # type: ignore[operator]


def _attempt(work: Callable[[], T], ranks: Ranks) -> Outcome[T]:
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


def _result(outcome: Outcome[T]) -> T:
    result, error = outcome
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
