"""Signals -> one agreed step: every rank stops at the same step boundary, for the same reason.

A handler sets a flag and returns. ``agree`` takes the largest flag of all ranks, so one rank's signal
stops all of them together. Flags come from

    SIGUSR1, SIGUSR2   Slurm's warning before the time limit (#SBATCH --signal)
    SIGTERM            preemption, requeue, cancel; it may come twice
    SIGINT             Ctrl-C; a second one leaves at once
    the clock          the job's own end, SLURM_JOB_END_TIME, is near
    a file             STOP in the run folder

Children must not die of signals that Slurm sends to every process of a step: start them inside
``shielded()``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcgpt.world import Ranks

LOOK_EVERY_S = 1.0  # a look at a network file system is not free, and steps of small models are short
SLACK_S = 10.0  # beyond two saves: the step that is under way, and leaving


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
        self._leave_at = leave_at(self._end, self._began, end_margin_s) if end.isdigit() else float("inf")

    def install(self) -> None:
        """Take over the signals of this process. Main thread only.

        Those that came before have waited: slurm/pretrain.sbatch starts a rank with all of them blocked.
        """
        for number in SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self._told = max(self._told, SIGNALS[signal.Signals(number)])

    def here(self) -> Stop:
        """The reason that this process knows of."""
        if self._told:
            return self._told
        if time.time() >= self._leave_at:
            return Stop.TIME_LIMIT
        if self._file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            # To os.path a file system that is out of order for a moment says no; Path's own way would end the run.
            self._asked = os.path.exists(self._file)  # noqa: PTH110
        return Stop.FILE if self._asked else Stop.NO

    def save_takes(self, seconds: float) -> float | None:
        """A save was seen to take so long: leave earlier if the job's own end would cut one off.

        Returns how many seconds before the end that is, if it is earlier than before.
        """
        if math.isinf(self._end):
            return None
        # Twice: one that is under way is finished first. At most half of the job: it must get somewhere.
        lead_s = min(2 * seconds + SLACK_S, (self._end - self._began) / 2)
        if self._end - lead_s >= self._leave_at:
            return None
        self._leave_at = self._end - lead_s
        return lead_s

    def agree(self, ranks: Ranks) -> Stop:
        """The reason that all ranks stop for, the same on each. A collective: every rank calls it."""
        here = self.here()
        if ranks.control is None:
            return here
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=ranks.control)
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
