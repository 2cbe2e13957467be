"""The training loop: what a step is, and when a run is evaluated, saved, reported and stopped.

Every rank runs it. Every decision depends only on what is the same on all ranks: the step, the configuration, the loss,
and the sums of their votes, on whether to stop and whether a stage of a save is complete. These are reduced together
with the loss, so a step has no collective for them. Only where there is something else than steps, an evaluation or a
rollback, the ranks agree by a collective of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.distributed.stop_signals import REASONS, Stop, StopFlag, elected
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import DivergedError
from hpcgpt.output.best_effort import only_informs
from hpcgpt.plan import Plan
from hpcgpt.run import metrics_file
from hpcgpt.training.checkpointer import Checkpointer
from hpcgpt.training.engine import Engine, PendingStep
from hpcgpt.training.hang_watchdog import START_S, Watchdog
from hpcgpt.training.profiler import Profiler
from hpcgpt.training.reporter import Reporter
from hpcgpt.training.resume import Rollback
from hpcgpt.training.samples import BrokenPassError, Sampler, sample_limit_s
from hpcgpt.training.spikes import SpikeDetector
from hpcgpt.training.stragglers import StragglerDetector

COLLECT_EVERY = 1000  # steps

Row = dict[str, Any]


@dataclass(kw_only=True)
class Loop:
    """The training loop of attempt `number`. `reporter` and `profiler` are None except on rank 0.

    `evaluate` returns the validation figures, or None if its argument, a function, returned True before they were
    complete.
    """

    plan: Plan
    ranks: Ranks
    number: int
    engine: Engine
    state: TrainState
    stop: StopFlag
    evaluate: Callable[[Callable[[], bool]], dict[str, float | None] | None]
    sampler: Sampler
    checkpointer: Checkpointer
    spikes: SpikeDetector
    rollback: Rollback
    stragglers: StragglerDetector
    watchdog: Watchdog
    reporter: Reporter | None
    profiler: Profiler | None
    _unread: PendingStep | None = None  # the last step that was launched, until its metrics are read
    _votes: Sequence[float] = ()  # of the last step that was read, until the next step boundary
    _agrees_now: bool = False  # at the next step boundary: a step was not all since the last one

    def __post_init__(self) -> None:
        # The host is a step ahead of the device; and several ranks read their votes when one more has been launched.
        self.stop.late_steps = self.engine.defers_metrics * (1 if self._alone else 2)

    @property
    def _alone(self) -> bool:
        return self.ranks.cpu_group is None

    @property
    def finished(self) -> bool:
        """Return whether all steps have been made and evaluated."""
        return self.state.step >= self.plan.total_steps and self.state.pending is None

    def run(self) -> Stop:
        """Train until the end or until a stop is requested; return the reason."""
        self.stop.look_from_now()
        while not self.finished:
            row = self._pending_row() or self._step()
            if row and self._is_evaluated(self.state.step) and not self._evaluate(row):
                self.state.pending = row  # a stop was requested: the next attempt evaluates this step
                return self.stop.agree(self.ranks)
            if row:
                self._report(row)
            if reason := self._decide():
                self._read_unread()
                return reason
            if row and self.checkpointer.is_regular(self.state.step):
                self.checkpointer.save()
            self._collect_garbage()
        return Stop.NO

    def _pending_row(self) -> Row | None:
        """Take the row of a step that an earlier attempt made, but could not evaluate before it was stopped."""
        row, self.state.pending = self.state.pending, None
        return row

    def _vote(self) -> list[float]:
        """Return this rank's votes at the end of a step. Alone it need not vote, and decides at the step boundary."""
        return [] if self._alone else [*self.stop.votes(self.ranks), *self.checkpointer.saver.votes]

    def _step(self) -> Row | None:
        """Make the next step; return its row if it has been read.

        On a GPU, a row that is not needed yet is read while the next step computes. After a rollback there is no row.
        """
        if self.profiler:
            with only_informs("the trace"):
                self.profiler.before(self.state.step + 1)
        pending_step = self.engine.launch(self.state.step, self.state.step + self.state.skipped, self._vote)
        if not self._read_unread():
            return None
        self.state.step, self.state.val_loss = self.state.step + 1, None
        step = self.state.step
        self.watchdog.step(step)
        for straggler in self.stragglers.after(step):
            if self.reporter:
                self.reporter.straggler(step, straggler)
        if self.reporter and self.stragglers.gathered:
            self.reporter.ranks(step, self.stragglers.gathered)
        self.trace(leaving=False)
        needed_now = step == self.plan.total_steps or self._is_evaluated(step) or self.checkpointer.is_regular(step)
        if self.engine.defers_metrics and not needed_now:
            self._unread = pending_step
            return None
        return self._read(pending_step)

    def _read_unread(self) -> bool:
        """Read and report the previous step, if that has not been done; return False if it caused a rollback."""
        pending_step, self._unread = self._unread, None
        if pending_step is None:
            return True
        row = self._read(pending_step)
        if row and self.reporter:
            self.reporter.row(row)
        return row is not None

    def _read(self, pending_step: PendingStep) -> Row | None:
        """Return the row of a step; None if it was a spike and caused a rollback.

        Raises:
            DivergedError: training has failed, and would fail again.
        """
        row = self.engine.read(pending_step) | {"attempt": self.number}
        loss, norm, *self._votes = pending_step.figures.tolist()
        verdict = self.spikes.check(
            row["step"], loss, norm, pending_step.result.skipped, lambda: self.engine.locate_nonfinite(pending_step)
        )
        if verdict.message and self.reporter:
            self.reporter.say(verdict.message)
            self.reporter.event("spike" if verdict.spike else "nonfinite", step=row["step"], words=verdict.message)
        if verdict.fatal:
            raise DivergedError(f"{verdict.message}{verdict.fatal}")
        return None if verdict.spike and self._roll_back(pending_step, row) else row

    def _roll_back(self, pending_step: PendingStep, row: Row) -> bool:
        """Go back to the last regular checkpoint, without the samples since; return False if there is none."""
        self._agrees_now = True
        self.checkpointer.finish()
        with self.watchdog.patience(START_S):
            target = self.rollback.target(row["step"])
            if target is None:
                return False
            self.trace(leaving=True)  # the steps in its name must not occur twice
            self.rollback.to(target, row, pending_step.batch + 1)
            return True

    def _is_evaluated(self, step: int) -> bool:
        every = self.plan.config.eval.every
        return bool(every) and (step % every == 0 or step == self.plan.total_steps)

    def _evaluate(self, row: Row) -> bool:
        """Add the validation figures to a row; return False if a stop was requested before they were complete."""
        self._agrees_now, started_at = True, time.monotonic()
        evaluated = self.evaluate(lambda: self._agree() != Stop.NO)
        if evaluated is None:
            return False
        figures = metrics_file.finite(evaluated)
        row |= figures | {"val/elapsed_s": time.monotonic() - started_at}
        self.state.val_loss = figures["val/loss"]
        return True

    def _report(self, row: Row) -> None:
        """Report a row, and a sample if the step was evaluated."""
        if self.reporter:
            self.reporter.row(row)
        settings, step = self.plan.config.sample, self.state.step
        if "val/loss" in row and settings.tokens:
            limit_s = sample_limit_s(settings.max_s, self.watchdog.limit_s)
            with only_informs("the sample", but=BrokenPassError):
                text = self.sampler.generate(step, limit_s, self._may_sample)
                if self.reporter:
                    self.reporter.sample(step, text)

    def _may_sample(self) -> bool:
        """Reset the watchdog; return False if a stop is requested. Called for each token of a sample."""
        self.watchdog.alive()
        return self.stop.here() == Stop.NO

    def _decide(self) -> Stop:
        """Return the reason for which all ranks stop at this step boundary, and advance the save that is under way.

        By the votes of the last step that was read: with metrics that are read late, that is the step before. After
        something else than a step the ranks agree anew, as a whole step would pass until their next votes.
        """
        votes, self._votes = self._votes, ()
        agrees_now, self._agrees_now = self._agrees_now or self._alone, False
        self.watchdog.alive()
        reason = Stop.NO
        if agrees_now:
            reason = self._agree(after_step=True)
        elif votes:
            self.checkpointer.poll(votes[len(REASONS) :])
            reason = elected(votes[: len(REASONS)])
        if self.reporter:
            self.reporter.lead(self.stop.lead_s, self.stop.step_s)
        return reason

    def _agree(self, after_step: bool = False) -> Stop:
        """Agree with all ranks whether to stop, by a collective: also between the batches of an evaluation."""
        self.watchdog.alive()
        self.checkpointer.poll()
        return self.stop.agree(self.ranks, after_step)

    def trace(self, leaving: bool) -> None:
        """Write the trace that ends at this step, if any. `leaving`: end it here, however short it is."""
        with only_informs("the trace"):
            if self.profiler and (path := self.profiler.after(self.state.step, leaving)) and self.reporter:
                self.reporter.say(f"traced until step {self.state.step:,}: {path}")

    def _collect_garbage(self) -> None:
        """Collect garbage on all ranks at the same step. Python alone would slow down each rank at a different one."""
        if self.state.step % COLLECT_EVERY == 0 or self._is_evaluated(self.state.step):
            gc.collect()
