"""A rank that does nothing for too long says where it stands, and ends.

A hang (a collective that one rank never entered, a disk that does not answer, a deadlock in a driver) would otherwise
burn GPU hours until a timeout of 10 to 30 minutes, and then tell nothing. Here each rank has a thread that counts
the seconds since training last said ``alive()``. Too many of them, and it writes the stacks of all threads to
``faults/<attempt>/rank_00003.stacks.txt``, and ends the process with FAILED: to the requeue policy, a crash. All
ranks do so at about the same time, so the stacks of all lie side by side. The one that is in no collective, or
has none, is the one to look at.

It counts its own seconds, not a clock's: a process that was stopped (SIGSTOP) and continues starts counting
again. Where the interpreter's lock itself is stuck, the thread cannot run; then faulthandler's own thread, which
needs no lock, prints the stacks to stderr and ends the process.

That thread has only a clock, which continues while a process is stopped. SIGTSTP (Ctrl-Z, and what Slurm sends before
it suspends a job) turns it off in time. A bare SIGSTOP cannot be caught: a process stopped by one for longer than the
limit and FAREWELL_S ends when it continues, and the next attempt resumes from its checkpoint. To count otherwise
without the interpreter's lock would take another process beside each rank, and would save few: the other ranks have
been waiting for this one and counted it a hang, and the timeouts of gloo and NCCL have only a clock, too.
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
START_S = 1800.0  # until the first steps: compilation, a cold file system
FAREWELL_S = 10.0  # a disk that does not answer must not keep the process


class Watchdog:
    def __init__(self, settings: options.Config, here: World, attempt: int) -> None:
        """Watches from now on, unless watchdog.hang_factor is 0. `attempt` is the generation. Main thread only."""
        self._settings, self._here, self._attempt = settings, here, attempt
        self._silent_s, self._patience_s = 0.0, 0.0
        self._step, self._step_at = 0, time.monotonic()
        self._steps_s: deque[float] = deque(maxlen=50)
        self._off = threading.Event()
        if settings.watchdog.hang_factor:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            signal.signal(signal.SIGTSTP, _stop)

    def alive(self) -> None:
        self._silent_s = 0.0

    def step(self, step: int) -> None:
        """Optimizer step number `step` is done."""
        now = time.monotonic()
        if self._step:
            self._steps_s.append(now - self._step_at)
        self._step, self._step_at = step, now
        self.alive()

    def off(self) -> None:
        self._off.set()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def patience(self, limit_s: float) -> Iterator[None]:
        """Allow at least `limit_s` seconds of silence inside, for what takes long and has no steps."""
        self.alive()
        self._patience_s, before = max(limit_s, self._patience_s), self._patience_s
        try:
            yield
        finally:
            self._patience_s = before
            self.alive()

    @property
    def limit_s(self) -> float:
        """How long is too long."""
        return max(self._patience_s, self._usual_limit_s())

    def _usual_limit_s(self) -> float:
        wanted = self._settings.watchdog
        if len(self._steps_s) < 3:
            return max(START_S, wanted.hang_min_s)
        return max(wanted.hang_min_s, wanted.hang_factor * statistics.median(self._steps_s))

    def _watch(self) -> None:
        while not self._off.wait(TICK_S):
            self._silent_s += TICK_S
            limit_s = self.limit_s
            faulthandler.dump_traceback_later(limit_s + FAREWELL_S, exit=True)
            if self._silent_s > limit_s:
                self._end()

    def _end(self) -> None:
        timer = threading.Timer(FAREWELL_S, os._exit, [FAILED])
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
        time.sleep(2 * TICK_S)  # `srun -K` ends the others when the first one leaves: let them speak
        os._exit(FAILED)


def _stop(_number: int, _frame: FrameType | None) -> None:
    """What SIGTSTP does by default, but the clock does not run meanwhile. The next look starts it again."""
    faulthandler.cancel_dump_traceback_later()
    os.kill(os.getpid(), signal.SIGSTOP)
