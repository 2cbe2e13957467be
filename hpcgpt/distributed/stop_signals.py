"""Stopping: all ranks stop at the same step boundary, for the same reason.

A signal handler sets a flag and returns. Each rank votes for the reason of its flag, and all get the sums of the votes:
the largest reason with a vote stops all of them together, so a signal to one rank is enough. The votes of a step travel
with its loss, which is reduced anyway (``hpcgpt.training.step``). Where there is no step, between the batches of an
evaluation, ``agree`` is a reduction of its own, of host memory. Flags are set by

    SIGUSR1, SIGUSR2   Slurm's warning before the time limit (#SBATCH --signal)
    SIGTERM            preemption, requeue, cancel; it may be sent twice
    SIGHUP             the terminal or the ssh session has ended; not handled under nohup
    SIGINT             Ctrl-C; a second one exits at once
    the clock          the job's own end is near: SLURM_JOB_END_TIME, until Slurm says otherwise (hpcgpt.slurm.job_end)
    a file             STOP in the run folder

The job's end counts as near when the remaining time is less than a step, two saves (one that is in progress has to
finish first) and SLACK_S together: flags are checked between steps, so after each check a whole step passes before the
next one. Where a GPU is ahead of the host, some more pass until the votes are known and all that was launched has ended
(`late_steps`). Steps and saves are measured during the run, and the most recent ones count; the remaining time is never
less than `requeue.end_margin_s`. A later warning of Slurm has no effect, because the clock has already stopped the run.

Child processes must not die of signals that Slurm sends to every process of a step: start them inside ``shielded()``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpcgpt.distributed.world import Ranks

LOOK_EVERY_S = 1.0  # between checks for the STOP file: a network file system is slow, and steps may be short
SLACK_S = 10.0  # in addition to a step and two saves: the time to exit
RECENT = 20  # gaps between checks; the longest of these is expected of the next
# Saves. While other jobs write to the file system, several saves in a row are slow: the longest of the last five is
# expected of the next. A single slow one counts for five saves, not for the rest of the run.
RECENT_SAVES = 5
STEP_FACTOR = 1.25  # a step may take longer than all before


class Stop(IntEnum):
    """The reason to stop; of several reasons the largest counts."""

    NO = 0
    FILE = 1
    TIME_LIMIT = 2
    INTERRUPT = 3
    TERMINATED = 4

    @property
    def message(self) -> str:
        return _MESSAGES[self]

    @classmethod
    def from_message(cls, message: str) -> Stop:
        """Return the code of a message that is on disk (`reason` in exit.json); Stop.NO for any other text."""
        return next((stop for stop, text in _MESSAGES.items() if text == message), cls.NO)


REASONS = tuple(Stop)[1:]  # in the order of votes
# Run folders on disk contain these: a message that is replaced must still be understood by from_message.
_MESSAGES = {
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
    """The reason to stop that this process has so far."""

    def __init__(self, stop_file: Path | None, end_margin_s: float, env: Mapping[str, str] = os.environ) -> None:
        """`stop_file` is None if another rank checks for it."""
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
        self.late_steps = 0  # steps that end between a check and the stop, besides the one that runs at the check

    def install(self) -> None:
        """Install the signal handlers. Main thread only.

        Earlier signals are still pending, because slurm/pretrain.sbatch starts a rank with all of them blocked.
        """
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: the run outlives the session
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
        self._told = max(self._told, SIGNALS[signal.Signals(number)])

    def here(self, by_clock: bool = True) -> Stop:
        """Return this process's reason to stop; without `by_clock`, the job's end is checked by another rank."""
        if self._told:
            return self._told
        if by_clock and time.time() >= self.leave_at:
            return Stop.TIME_LIMIT
        if self._file and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            # os.path.exists returns False if the file system fails for a moment; Path.exists would raise.
            self._asked = os.path.exists(self._file)  # noqa: PTH110
        return Stop.FILE if self._asked else Stop.NO

    @property
    def end(self) -> float:
        """The end of the job in unix seconds; inf if it is not known."""
        return self._end

    def ends_at(self, end: float) -> None:
        """Set the end of the job, in unix seconds."""
        self._end = end

    @property
    def leave_at(self) -> float:
        """When to stop because of the job's end, in unix seconds; inf if the end is not known."""
        return min(leave_at(self._end, self._began, self._margin_s), self._end - self.lead_s)

    @property
    def lead_s(self) -> float:
        """How many seconds before the job's end to stop, from measured steps and saves: at most half of the job, so
        that there is time to train.
        """
        if math.isinf(self._end) or (not self._saves and not self._gaps):
            return 0.0
        wanted_s = STEP_FACTOR * (1 + self.late_steps) * self.step_s + 2 * max(self._saves, default=0.0) + SLACK_S
        return max(0.0, min(wanted_s, (self._end - self._began) / 2))

    @property
    def step_s(self) -> float:
        """The longest recent time between two checks: a step, and everything else between them."""
        return max(self._gaps, default=0.0)

    def save_takes(self, seconds: float) -> None:
        """Record how long a save took; the longest of the last RECENT_SAVES counts."""
        self._saves.append(seconds)

    def look_from_now(self) -> None:
        """Start measuring the time between checks, when the first step begins."""
        self._last_look = time.monotonic()

    def votes(self, ranks: Ranks) -> list[float]:
        """Return this rank's votes at the end of a step: 1 for its reason to stop, 0 for the others.

        ``elected`` returns the reason from their sums.
        """
        here = self._look(ranks, after_step=True)
        return [float(here == reason) for reason in REASONS]

    def agree(self, ranks: Ranks, after_step: bool = False) -> Stop:
        """Return the reason for which all ranks stop, the same on each. A collective.

        `after_step`: a step has ended since the last check; the time since then is expected of the next step.
        """
        here = self._look(ranks, after_step)
        if ranks.cpu_group is None:
            return here
        from hpcgpt.distributed.collectives import merge_on_all  # loads torch

        return merge_on_all(ranks, lambda: here, max)

    def _look(self, ranks: Ranks, after_step: bool) -> Stop:
        """Return this rank's reason to stop, and measure the time since the last check."""
        now = time.monotonic()
        if after_step and self._last_look is not None:
            self._gaps.append(now - self._last_look)
        self._last_look = now
        # Only rank 0 asks Slurm for the job's end, so its clock decides for all.
        return self.here(by_clock=ranks.world.is_first)


def elected(votes: Sequence[float]) -> Stop:
    """Return the largest reason that has a vote; `votes` are the sums of ``StopFlag.votes`` over the ranks."""
    return max((reason for reason, count in zip(REASONS, votes, strict=True) if count), default=Stop.NO)


def leave_at(end: float, now: float, margin_s: float) -> float:
    """Return when to stop in a job that ends at `end`, in unix seconds.

    A short job gives up at most a fifth of its time: with the whole margin it might never train.
    """
    return end - min(margin_s, max(0.0, end - now) / 5)


@contextmanager
def shielded() -> Iterator[None]:
    """Block our signals in processes and threads that are started inside; this process handles them afterwards.

    The signal mask is inherited through fork and exec. A program can still unblock a signal itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
