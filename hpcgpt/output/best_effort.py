"""The boundary around what only informs: it can neither end nor delay a run.

Console, metrics.jsonl, events, samples, traces, goodput and the dashboard only inform. Training calls them through:

    only_informs(what)    turns any exception inside into a warning
    Worker                runs on a daemon thread what may wait for a disk or a network
    within(seconds, ...)  waits that long for a result, and continues without it; `limited` raises TimeoutError then

Nothing that a checkpoint needs goes through here: there an error must be raised.

No torch in here.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from hpcgpt.errors import UserError, sentence
from hpcgpt.output import streams

T = TypeVar("T")

MOST_WAITING = 100_000  # actions; with more, new ones are dropped
MOST_WARNINGS = 5  # of one kind: a full disk fails at each step

_warned: Counter[str] = Counter()


@contextmanager
def only_informs(what: str, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn any exception inside into a warning that names `what`, the first few times; except one of type `but`."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        warn(what, error)


def warn(what: str, error: BaseException) -> None:
    """Print a warning that `what` has failed, up to MOST_WARNINGS times."""
    _warned[what] += 1
    if _warned[what] > MOST_WARNINGS:
        return
    last = "; no more such warnings are printed" if _warned[what] == MOST_WARNINGS else ""
    message = sentence(error)
    if not isinstance(error, OSError | UserError):
        message = f"{type(error).__name__}: {message}"
    streams.warn(f"{what}: {message}; training continues{last}")


class Worker:
    """Runs actions one after the other on a daemon thread; their exceptions become warnings."""

    def __init__(self, name: str) -> None:
        self._actions: deque[tuple[str, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._busy = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def post(self, what: str, action: Callable[[], object]) -> None:
        """Queue `action` and return at once."""
        with self._changed:
            if len(self._actions) < MOST_WAITING:
                self._actions.append((what, action))
                self._changed.notify_all()
                return
        warn(what, TimeoutError(f"{MOST_WAITING:,} actions are waiting already, this one is dropped"))

    def drain(self, limit_s: float) -> bool:
        """Wait until all queued actions are done, for `limit_s` seconds at most; return False if they are not."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._actions and not self._busy, limit_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._actions)
                what, action = self._actions.popleft()
                self._busy = True
            with only_informs(what):
                action()
            with self._changed:
                self._busy = False
                self._changed.notify_all()


def within(limit_s: float, what: str, work: Callable[[], T]) -> T | None:
    """Return the result of `work`; None, with a warning, if it fails or takes longer than `limit_s` seconds."""
    found: list[T] = []
    with only_informs(what):
        found.append(limited(limit_s, work))
    return found[0] if found else None


def limited(limit_s: float, work: Callable[[], T]) -> T:
    """Return the result of `work`, or raise its error.

    Work that takes longer continues on its daemon thread, and its result is discarded.

    Raises:
        TimeoutError: it takes longer than `limit_s` seconds.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    raise errors[0] if errors else TimeoutError(f"no answer within {limit_s:.0f} s")
