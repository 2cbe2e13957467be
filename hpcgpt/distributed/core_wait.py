"""How long this thread waits for a core, because other work keeps all of its cores busy.

Linux counts for each thread how long it was ready to run and had no core: the second number of
/proc/thread-self/schedstat, in nanoseconds (proc_pid_schedstat(5)). On idle cores that is below 1 % of the time,
whatever the program does: waiting for a disk, another rank or another thread does not count. Where one thread of a rank
has no core, all others wait for it at the end of each operation.

No torch in here.
"""

from __future__ import annotations

import time
from pathlib import Path

EVERY_S = 10.0
LARGE = 0.2  # of the time
IN_A_ROW = 6  # so a minute: a save of this run needs cores, too, and so does another program's start


def waited_s() -> float | None:
    """Return how long this thread has waited for a core since its start; None where that is not counted."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


class CoreWait:
    """Warns once that the cores of a rank are busy with other work, if it has several threads."""

    def __init__(self, threads: int, every_s: float = EVERY_S) -> None:
        self._threads, self._every_s = threads, every_s
        self._last: tuple[float, float] | None = None  # monotonic clock, and waited_s, both in seconds
        self._strikes = 0
        self._is_over = threads < 2

    def warning(self) -> str:
        """Return the warning if it is time for it, else ''. Call it after each step, in the same thread."""
        now = time.monotonic()
        if self._is_over or (self._last and now - self._last[0] < self._every_s):
            return ""
        waited = waited_s()
        if waited is None:
            self._is_over = True
            return ""
        last, self._last = self._last, (now, waited)
        if last is None:  # the first step: a model may have been compiled before it
            return ""
        share = (waited - last[1]) / (now - last[0])
        self._strikes = self._strikes + 1 if share >= LARGE else 0
        if self._strikes < IN_A_ROW:
            return ""
        self._is_over = True
        return (
            f"other work keeps the cores busy: {share:.0%} of the time this rank was ready to run and had no core. Its "
            f"{self._threads} threads then wait for each other; with --run.threads 1 it may be several times faster"
        )
