"""One run with faults: they are injected one after the other until the time is over; then the run ends by itself.

Between two faults the drill waits until the run makes steps again, the fault's cleanup is done, and all nodes answer:
so each fault meets a run that is training, and its cost can be measured. No faults are injected near a run's end.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from hpcgpt.drill.faults import Expected, FaultContext, FaultKind, FaultSchedule, MissedError, ScheduledFault
from hpcgpt.drill.testbed import Testbed
from hpcgpt.drill.watched_run import CleanupStack, WatchedRun
from hpcgpt.output.counted import counted

Outcome = Literal["came back", "went on", "missed", "FAILED"]
NO_FAULTS_AFTER = 0.85  # share of a run's steps
POLL_S = 0.1


@dataclass
class FaultResult:
    """One fault and what followed. `back_s`: from the fault (or from its cleanup, if the run has to wait for that) to
    the first new step; `lost_steps` had to be repeated."""

    round: int
    at_s: float
    kind: str
    victim: str
    outcome: Outcome
    step: int
    note: str = ""
    back_s: float | None = None
    lost_steps: int | None = None


@dataclass
class RoundResult:
    """The faults that one run was given, and its `problems`: why it did not end well."""

    number: int
    partition: str
    job: str = ""
    faults: list[FaultResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class StuckError(Exception):
    """What was waited for did not happen in time."""


class DrillError(Exception):
    """The drill itself has failed."""


class JobOverError(Exception):
    """The job has ended."""


class Recovery:
    """Waits for the first step that a run makes after a fault, in the way that is expected of this kind of fault."""

    def __init__(self, context: FaultContext, expected: Expected, attempt: int) -> None:
        """`attempt` is the one that the fault hit, just now."""
        self._context, self._expected, self._attempt = context, expected, attempt
        self._since = time.time()
        self._newest_step = context.run.position()[0]  # of that attempt
        self._first_row: Mapping[str, Any] = {}

    def is_complete(self) -> bool:
        """Is there a new step, as expected?"""
        run, restart = self._context.run, self._expected == "restart"
        step, attempt = run.position()
        if attempt == self._attempt:
            self._newest_step = max(self._newest_step, step)
        if not restart and not (self._context.cleanup.empty and self._context.done()):
            self._since = time.time()
            return False
        after = self._attempt if restart else self._attempt - 1
        new_rows = (row for row in run.tail() if row["attempt"] > after and row["time"] > self._since)
        self._first_row = next(new_rows, {})
        return bool(self._first_row) and self._context.done()

    def describe(self, result: FaultResult) -> None:
        """Record how the run recovered, once it has."""
        restarted = self._first_row["attempt"] > self._attempt
        result.outcome = "came back" if restarted else "went on"
        result.back_s = self._first_row["time"] - self._since
        result.lost_steps = 0
        if restarted:
            resumed = [start["step"] for start in self._context.run.starts() if start["attempt"] > self._attempt]
            result.lost_steps = max(0, self._newest_step - resumed[0]) if resumed else None


@dataclass
class FaultInjector:
    """Injects faults into one run after the other. Times are of time.monotonic; `limit_s` is the longest wait."""

    testbed: Testbed
    schedule: FaultSchedule
    kinds: Mapping[str, FaultKind]
    training: Sequence[str]
    steps: int
    began_at: float
    until: float
    limit_s: float
    log: Callable[[str], None]

    def run(self, number: int, name: str, partition: str, watched: WatchedRun) -> RoundResult:
        """Start a run, and inject faults until it ends. Whatever happens, their cleanup is done on return."""
        this_round = RoundResult(number, partition)
        cleanup = CleanupStack(self.log)
        try:
            this_round.job = self.testbed.start(name, self.training, partition)
            self.log(f"round {number}: job {this_round.job}, partition {partition}")
            with suppress(JobOverError):
                self._inject_all(this_round, watched, cleanup)
            self._wait_for_end(this_round, watched, cleanup)
        except StuckError as stuck:
            this_round.problems.append(f"{stuck}\n{self.testbed.failure_details(this_round.job)}")
            self.testbed.cancel_all()
        except Exception:  # of the drill itself: the report still has what was seen until now
            this_round.problems.append(f"the drill failed:\n{traceback.format_exc()}")
            self.testbed.cancel_all()
        finally:
            cleanup.run_all()
        if not this_round.problems and self.testbed.state(this_round.job) != "finished":
            this_round.problems.append(f"the run was given up:\n{self.testbed.failure_details(this_round.job)}")
        if not this_round.problems:
            self._check_for_orphans(this_round)
        return this_round

    def _inject_all(self, this_round: RoundResult, run: WatchedRun, cleanup: CleanupStack) -> None:
        while True:
            self._wait(this_round, cleanup, lambda: self._ready(run, cleanup), "training, and all nodes to answer")
            scheduled = self._next(run)
            try:
                self._pause(this_round, cleanup, scheduled.delay_s)
                enough = self._enough(run, self.kinds[scheduled.kind].checkpoints)
                self._wait(this_round, cleanup, enough, "checkpoints")
            except JobOverError:
                self.schedule.put_back(scheduled)
                raise
            if self._no_more_faults(run):
                self.schedule.put_back(scheduled)
                return
            result = self._inject(this_round, run, cleanup, scheduled)
            this_round.faults.append(result)
            self.log(_line(result))
            if result.outcome == "FAILED":
                this_round.problems.append(f"{result.kind} ({result.victim}): {result.note}")

    def _next(self, run: WatchedRun) -> ScheduledFault:
        """Return the next fault for which the rest of the run is long enough; those before it are put back."""
        left_s = (self.steps - run.position()[0]) * run.step_s()
        waiting = []
        for _ in self.kinds:
            scheduled = self.schedule.next()
            if self.kinds[scheduled.kind].takes_s + scheduled.delay_s <= left_s:
                break
            waiting.append(scheduled)
        else:
            scheduled = waiting.pop(0)
        for other in reversed(waiting):
            self.schedule.put_back(other)
        return scheduled

    def _ready(self, run: WatchedRun, cleanup: CleanupStack) -> bool:
        step, attempt = run.position()
        trains = step > 0 and attempt == run.newest_start()
        return self._no_more_faults(run) or (trains and cleanup.empty and self.testbed.healthy())

    def _enough(self, run: WatchedRun, checkpoints: int) -> Callable[[], bool]:
        return lambda: len(run.committed()) >= checkpoints or self._no_more_faults(run)

    def _no_more_faults(self, run: WatchedRun) -> bool:
        return time.monotonic() > self.until or run.position()[0] > NO_FAULTS_AFTER * self.steps

    def _failed(self, this_round: RoundResult, result: FaultResult, why: str) -> None:
        """Record a fault that the run has not survived."""
        result.outcome, result.note = "FAILED", why
        this_round.faults.append(result)
        self.log(_line(result))

    def _inject(
        self, this_round: RoundResult, run: WatchedRun, cleanup: CleanupStack, scheduled: ScheduledFault
    ) -> FaultResult:
        """Inject one fault, and wait until the run has recovered."""
        kind = self.kinds[scheduled.kind]
        context = FaultContext(self.testbed, this_round.job, self.training, run, scheduled, cleanup)
        step, attempt = run.position()
        result = FaultResult(this_round.number, time.monotonic() - self.began_at, kind.name, "", "missed", step)
        if attempt != run.newest_start():
            result.note = "the run had stopped training by itself"
            return result
        try:
            result.victim = kind.inject(context)
        except MissedError as missed:
            result.note = str(missed)
            return result
        recovery = Recovery(context, kind.expected, attempt)
        self.log(f"  {kind.name}: {result.victim}")
        try:
            self._wait(this_round, cleanup, recovery.is_complete, f"new steps after: {kind.name} ({result.victim})")
        except JobOverError:
            if self.testbed.state(this_round.job) != "finished":
                self._failed(this_round, result, "the job ended")
                raise
            result.note = "the run finished before it noticed"
            if kind.expected == "on":
                result.outcome = "went on"
            return result
        except StuckError as stuck:
            self._failed(this_round, result, str(stuck))
            raise
        recovery.describe(result)
        broken = [problem for check in context.checks if (problem := check())]
        if kind.expected == "on" and result.outcome == "came back":
            broken.append("this attempt should have continued, but the run was restarted")
        if broken:
            result.outcome, result.note = "FAILED", "; ".join(broken)
        return result

    # --- waiting -----------------------------------------------------------------------------------

    def _wait(self, this_round: RoundResult, cleanup: CleanupStack, condition: Callable[[], bool], what: str) -> None:
        """Wait until `condition` holds, and run the cleanup that is due. Raises JobOverError if the job ends first, and
        StuckError after `limit_s`."""
        deadline, ask_at = time.monotonic() + self.limit_s, 0.0
        while True:
            cleanup.run_due()
            if condition():
                return
            if time.monotonic() > ask_at:
                if self.testbed.state(this_round.job) in ("finished", "over"):
                    raise JobOverError
                ask_at = time.monotonic() + 1
            if time.monotonic() > deadline:
                raise StuckError(f"waited {self.limit_s:.0f} s for {what}")
            time.sleep(POLL_S)

    def _wait_for_end(self, this_round: RoundResult, run: WatchedRun, cleanup: CleanupStack) -> None:
        """Wait for the job's end. Raises StuckError after `limit_s` without a step."""
        seen, deadline = run.position(), time.monotonic() + self.limit_s
        while self.testbed.state(this_round.job) not in ("finished", "over"):
            cleanup.run_due()
            if (now := run.position()) != seen:
                seen, deadline = now, time.monotonic() + self.limit_s
            if time.monotonic() > deadline:
                raise StuckError(f"no step and no end for {self.limit_s:.0f} s")
            time.sleep(0.3)

    def _pause(self, this_round: RoundResult, cleanup: CleanupStack, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(this_round, cleanup, lambda: time.monotonic() > until, "nothing")

    def _check_for_orphans(self, this_round: RoundResult, limit_s: float = 60.0) -> None:
        """Check that all ranks have ended, also orphans on nodes that were lost."""
        deadline = time.monotonic() + limit_s
        while left := self.testbed.ranks(this_round.job):
            if time.monotonic() > deadline:
                names = ", ".join(f"{rank} (pid {rank.pid})" for rank in left)
                this_round.problems.append(f"{limit_s:.0f} s after the end there are still processes: {names}")
                return
            time.sleep(1)


def _line(result: FaultResult) -> str:
    parts = [f"  {result.kind}: {result.outcome}"]
    if result.back_s is not None:
        parts.append(f"first new step after {result.back_s:.1f} s")
    if result.outcome == "came back" and result.lost_steps is not None:
        parts.append(f"{counted(result.lost_steps, 'step')} lost")
    return ", ".join([*parts, *([result.note] if result.note else [])])
