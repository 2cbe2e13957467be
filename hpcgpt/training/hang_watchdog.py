"""Ends a rank that hangs, after it has written the stacks of its threads.

A hang (a collective that one rank never entered, a disk that does not answer, a deadlock in a driver) would otherwise
waste GPU hours until a timeout of 10 to 30 minutes, which explains nothing. Here a thread of each rank counts the
seconds since training last called ``alive()``. If there are too many, it writes the stacks of all threads to
``faults/<attempt>/rank_00003.stacks.txt``, and ends the process with FAILED: to the requeue policy, a crash. All ranks
do so at about the same time, so the stacks of all are in one folder. The rank to look at is the one that is not in a
collective, or has written no stacks.

The thread counts its own ticks and reads no clock: a process that was stopped (SIGSTOP) and continues does not count
the time in between. While another thread holds the interpreter lock it cannot run. Then faulthandler's thread, which
does not need the lock, prints the stacks to stderr and ends the process.

That thread reads a clock, which continues while a process is stopped. SIGTSTP (Ctrl-Z, and what Slurm sends before it
suspends a job) turns it off in time. SIGSTOP cannot be caught: a process stopped by it for longer than the limit and
REPORT_S ends when it continues, and the next attempt resumes from its checkpoint. To avoid this would take another
process beside each rank, and would help little: the other ranks have been waiting for this one and have counted it as a
hang, and the timeouts of gloo and NCCL read a clock, too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hpcgpt.config import options
from hpcgpt.distributed.world import World
from hpcgpt.exit_codes import FAILED
from hpcgpt.output import streams
from hpcgpt.run import crash_report, run_folder

TICK_S = 1.0
START_S = 1800.0  # limit for each part of the start but loading, and until the first steps: compilation, a cold disk
REPORT_S = 10.0  # limit for writing stacks: the disk may not answer


class Watchdog:
    def __init__(self, settings: options.Config, here: World, attempt: int) -> None:
        """Start to watch, unless watchdog.hang_factor is 0. `attempt` is the generation. Main thread only."""
        self._settings, self._here, self._attempt = settings, here, attempt
        self._silent_s, self._patience_s = 0.0, 0.0
        self._step, self._step_at = 0, time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=50)
        self._off = threading.Event()
        if settings.watchdog.hang_factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            signal.signal(signal.SIGTSTP, _stop)

    def alive(self) -> None:
        """Count from 0 again: training makes progress."""
        self._silent_s = 0.0

    def step(self, step: int) -> None:
        """Record the end of optimizer step number `step`."""
        now = time.monotonic()
        if self._step:
            self._steps_s.append(now - self._step_at)
        self._step, self._step_at = step, now
        self.alive()

    def off(self) -> None:
        """Stop watching."""
        self._off.set()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def patience(self, limit_s: float) -> Iterator[None]:
        """Allow at least `limit_s` seconds without `alive` inside, for work that takes long and has no steps."""
        self.alive()
        self._patience_s, before = max(limit_s, self._patience_s), self._patience_s
        try:
            yield
        finally:
            self._patience_s = before
            self.alive()

    @property
    def limit_s(self) -> float:
        """Return how many seconds without `alive` count as a hang."""
        return max(self._patience_s, self._usual_limit_s())

    def _usual_limit_s(self) -> float:
        settings = self._settings.watchdog
        if len(self._steps_s) < 3:
            return max(START_S, settings.hang_min_s)
        return max(settings.hang_min_s, settings.hang_factor * statistics.median(self._steps_s))

    def _watch(self) -> None:
        while not self._off.wait(TICK_S):
            self._silent_s += TICK_S
            limit_s = self.limit_s
            faulthandler.dump_traceback_later(limit_s + REPORT_S, exit=True)
            if self._silent_s > limit_s:
                self._end()

    def _end(self) -> None:
        """Write the stacks, report the hang, and end the process."""
        timer = threading.Timer(REPORT_S, os._exit, [FAILED])
        timer.daemon = True
        timer.start()
        host = socket.gethostname()
        reason = f"hang: nothing for {self._silent_s:.0f} s after step {self._step:,}"
        folder = self._settings.run_folder
        with suppress(OSError):
            stacks = crash_report.path_of(folder, self._here).with_suffix(".stacks.txt")
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with open(stacks, "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            reason += f"; its stacks are in {stacks}"
        print(f"error: {self._here}: {reason}", file=sys.stderr, flush=True)
        crash_report.write_message(folder, self._here, FAILED, reason, [], self._step, "hang")
        with suppress(OSError):
            run_folder.record(
                folder, "hang", attempt=self._attempt, rank=self._here.rank, host=host, step=self._step,
                silent_s=self._silent_s,
            )  # fmt: skip
        streams.drain()
        time.sleep(2 * TICK_S)  # `srun -K` ends all ranks once the first one has exited: the others need time to write
        os._exit(FAILED)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """Cancel faulthandler's timer, then stop as SIGTSTP does by default. The next tick starts the timer again."""
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)
