"""Signals -> one agreed step: every rank stops at the same step boundary, for the same reason.

A handler sets a flag and returns. ``agree`` takes the largest flag of all ranks, so one rank's signal
stops all of them together. Flags come from

    SIGUSR1, SIGUSR2   Slurm's warning before the time limit (#SBATCH --signal)
    SIGTERM            preemption, requeue, cancel; it may come twice
    SIGHUP             the terminal or the ssh session is gone; left alone where nohup ignores it
    SIGINT             Ctrl-C; a second one leaves at once
    the clock          the job's own end is near: SLURM_JOB_END_TIME, until Slurm says otherwise (hpcgpt.slurm.job_end)
    a file             STOP in the run folder

How near is near: the flag is looked at between steps, so once a look has said no, a whole step passes before the next
one. What is left of the job at a look has to hold that step, two saves (one that is under way is finished first) and
SLACK_S. Steps and saves are measured while the run lasts, and the last few count; `requeue.end_margin_s` is the least.
A warning of Slurm's that comes later than that changes nothing: the clock has said so before.

Children must not die of signals that Slurm sends to every process of a step: start them inside
``shielded()``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcgpt.distributed.world import Ranks

LOOK_EVERY_S = 1.0  # a look at a network file system is not free, and steps of small models are short
SLACK_S = 10.0  # beyond a step and two saves: leaving
RECENT = 20  # gaps between looks; the longest of these is the one to expect
# Saves. While other jobs write to the file system, saves are slow one after the other: the longest of the last five is
# the one to expect. A single slow one is forgotten after that, and costs the lead of five saves, not of all to come.
RECENT_SAVES = 5
STEP_FACTOR = 1.25  # a step may take longer than any so far


class Stop(IntEnum):
    """Why to stop; of several reasons the largest counts."""

    NO = 0
    FILE = 1
    TIME_LIMIT = 2
    INTERRUPT = 3
    TERMINATED = 4

    @property
    def words(self) -> str:
        return _WORDS[self]


_WORDS = {
    Stop.NO: "",
    Stop.FILE: "a STOP file",
    Stop.TIME_LIMIT: "the time limit is near",
    Stop.INTERRUPT: "interrupted",
    Stop.TERMINATED: "told to terminate",
}
SIGNALS = {
    signal.SIGUSR1: Stop.TIME_LIMIT,
    signal.SIGUSR2: Stop.TIME_LIMIT,
    signal.SIGTERM: Stop.TERMINATED,
    signal.SIGHUP: Stop.TERMINATED,
    signal.SIGINT: Stop.INTERRUPT,
}


class StopFlag:
    """Why this process was told to stop, so far."""

    def __init__(self, stop_file: Path | None, end_margin_s: float, env: Mapping[str, str] = os.environ) -> None:
        """`stop_file` is None where another rank looks for it."""
        self._told = Stop.NO
        self._asked, self._next_look = False, 0.0
        self._interrupted = False
        self._file = stop_file
        end = env.get("SLURM_JOB_END_TIME", "")
        self._began, self._end = time.time(), float(end) if end.isdigit() else float("inf")
        self._margin_s = end_margin_s
        self._saves: deque[float] = deque(maxlen=RECENT_SAVES)
        self._gaps: deque[float] = deque(maxlen=RECENT)
        self._last_look: float | None = None

    def install(self) -> None:
        """Take over the signals of this process. Main thread only.

        Those that came before have waited: slurm/pretrain.sbatch starts a rank with all of them blocked.
        """
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the session may end, the run is to stay
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self._told = max(self._told, SIGNALS[signal.Signals(number)])

    def here(self, by_clock: bool = True) -> Stop:
        """The reason that this process knows of; without `by_clock` the job's end is left to another rank."""
        if self._told:
            return self._told
        if by_clock and time.time() >= self.leave_at:
            return Stop.TIME_LIMIT
        if self._file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            # To os.path a file system that is out of order for a moment says no; Path's own way would end the run.
            self._asked = os.path.exists(self._file)  # noqa: PTH110
        return Stop.FILE if self._asked else Stop.NO

    @property
    def end(self) -> float:
        """When the job ends, in unix seconds; inf where that is not known."""
        return self._end

    def ends_at(self, end: float) -> None:
        """Believe from now on that the job ends then, in unix seconds."""
        self._end = end

    @property
    def leave_at(self) -> float:
        """When the clock says stop, in unix seconds; inf where the job has no known end."""
        return min(leave_at(self._end, self._began, self._margin_s), self._end - self.lead_s)

    @property
    def lead_s(self) -> float:
        """Seconds that leaving takes, as far as steps and saves were measured: at most half of the job, which has to
        get somewhere.
        """
        if math.isinf(self._end) or (not self._saves and not self._gaps):
            return 0.0
        wanted_s = STEP_FACTOR * self.step_s + 2 * max(self._saves, default=0.0) + SLACK_S
        return max(0.0, min(wanted_s, (self._end - self._began) / 2))

    @property
    def step_s(self) -> float:
        """The longest that a look was waited for lately: a step, and what else stood between two looks."""
        return max(self._gaps, default=0.0)

    def save_takes(self, seconds: float) -> None:
        """Note how long a save took; the longest of the last RECENT_SAVES counts."""
        self._saves.append(seconds)

    def look_from_now(self) -> None:
        """The first step begins: what came before does not count as the wait for a look."""
        self._last_look = time.monotonic()

    def agree(self, ranks: Ranks, after_step: bool = False) -> Stop:
        """The reason that all ranks stop for, the same on each. A collective: every rank calls it.

        `after_step`: a step has ended since the last look; the time since then is what the next one may take.
        """
        now = time.monotonic()
        if after_step and self._last_look is not None:
            self._gaps.append(now - self._last_look)
        self._last_look = now
        # Rank 0 alone asks Slurm when the job ends, so its clock decides for all.
        here = self.here(by_clock=ranks.world.is_first)
        if ranks.cpu_group is None:
            return here
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=ranks.cpu_group)
        return Stop(int(flag))


def leave_at(end: float, now: float, margin_s: float) -> float:
    """When to leave a job that ends at `end`, in unix seconds.

    A short job gives up a fifth of its time at most: with the whole margin it might never get anywhere.
    """
    return end - min(margin_s, max(0.0, end - now) / 5)


@contextmanager
def shielded() -> Iterator[None]:
    """Processes and threads started inside do not hear our signals; we hear them afterwards.

    The mask is inherited through fork and exec. A program can still ask for a signal itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
