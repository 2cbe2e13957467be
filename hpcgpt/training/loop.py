"""The training loop: what happens between the first step of an attempt and its last.

An attempt meets the other ranks, takes a generation of the run folder, loads the newest valid
checkpoint, and steps. After each step it evaluates and saves where that is due, and asks all ranks
whether to stop. Told to stop, it saves that very step and leaves with status 75.
"""

from __future__ import annotations

import gc
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcgpt import exit_codes, plan
from hpcgpt.checkpoint import init_from, layout, load, retention
from hpcgpt.checkpoint.save import Saved, Saver, tensors_of
from hpcgpt.config import sources
from hpcgpt.data.shard_check import ShardCheck
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.collectives import on_all, on_first
from hpcgpt.distributed.stop_signals import RECENT_SAVES, Stop, StopFlag
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.errors import DivergedError, UserError
from hpcgpt.model import host_memory
from hpcgpt.output.best_effort import only_informs
from hpcgpt.plan import Plan
from hpcgpt.run import metrics_file, records, run_folder
from hpcgpt.storage import lease
from hpcgpt.storage.lease import Generation
from hpcgpt.tokenizer import save_load
from hpcgpt.training import in_effect
from hpcgpt.training.engine import Engine, Launched
from hpcgpt.training.evaluation import Terms, bytes_of_ids, evaluate_all, held_out
from hpcgpt.training.hang_watchdog import START_S, Watchdog
from hpcgpt.training.profiler import Profiler
from hpcgpt.training.reporter import Reporter, Story
from hpcgpt.training.spikes import Judge
from hpcgpt.training.stragglers import Blame

COLLECT_EVERY = 1000  # steps
LAST_WORDS_S = 60.0  # what the reporter may take at the end, at most


def train(planned: Plan, here: World, flag: StopFlag, began_at: float) -> int:
    """Run one attempt to its end; returns its exit status, the same on every rank.

    `began_at` is when this process began, in unix seconds.
    """
    settings = planned.config
    times = {"imports_s": time.time() - began_at}
    torch.set_num_threads(settings.run.threads or world.cores(here))
    device = world.pick_device(here, settings.run.device)
    if device.type == "cpu":
        host_memory.keep_freed()
    ranks = rendezvous.connect(
        here, device, settings.run_folder, settings.run.backend, settings.run.rendezvous_timeout_s
    )
    held = _take(ranks, settings.run_folder)
    times["meet_s"] = time.time() - began_at - times["imports_s"]
    try:
        status = Attempt(planned, ranks, held, flag, began_at, times).run()
        # Rank 0 has more to do at the end, and `srun -K` ends whoever is left when the first rank leaves.
        on_first(ranks, lambda: None)
    except RuntimeError as error:
        if not rendezvous.is_broken_connection(error):
            raise
        raise ConnectionError(f"{here} lost its connection to another rank, which has ended: see its words") from error
    finally:
        if held is not None:
            held.release()
    return status


def sample_limit_s(wanted_s: float, hang_s: float) -> float:
    """How long a sample may take: the other ranks wait for it in a collective, and must not take it for a hang."""
    return min(wanted_s, hang_s / 2, rendezvous.COLLECTIVE_TIMEOUT.total_seconds() / 2)


def _take(ranks: Ranks, folder: Path) -> Generation | None:
    """Rank 0 takes the run folder; None on the others."""
    taken: list[Generation] = []

    def take() -> None:
        run_folder.prepare(folder)
        taken.append(lease.take(folder, world.job_attempt()))

    on_first(ranks, take)
    return taken[0] if taken else None


@dataclass
class Progress:
    """`pending` is the row of a step whose evaluation is still to be done, `val_loss` that of this very step, `skipped`
    the global batches that were left out so far, because of `rollbacks`.
    """

    step: int = 0
    pending: dict[str, Any] | None = None
    val_loss: float | None = None
    skipped: int = 0
    rollbacks: int = 0


class Attempt:
    """One attempt at a run, from its generation to its exit status."""

    def __init__(
        self,
        planned: Plan,
        ranks: Ranks,
        held: Generation | None,
        flag: StopFlag,
        began_at: float,
        times: dict[str, float],
    ) -> None:
        """`times` has the seconds that the start took so far; see the event "ready"."""
        self.plan, self.ranks, self.held, self.flag = planned, ranks, held, flag
        self._began_at, self._times = began_at, times
        self.config = settings = planned.config
        self.folder = settings.run_folder
        self.number = on_first(ranks, lambda: held.number if held else 0)
        if not held:
            lease.watch(self.folder, self.number)
        self._watchdog = Watchdog(settings, ranks.world, self.number)
        self._blame = Blame(settings.blame, ranks)
        self.engine = Engine(planned, ranks, self._blame.local)
        self._hosts = on_all(ranks, socket.gethostname)
        first = planned.sets[0]
        self.words = save_load.load(first.folder / "tokenizer", first.manifest.tokenizer["fingerprint"])
        self._held_out, self._token_bytes = held_out(planned), bytes_of_ids(self.words, settings.model.vocab_size)

        self.progress = Progress()
        self._in_effect, self._changes = in_effect.collect(planned, ranks, self.engine), in_effect.Changes(0)
        self._origin = ""  # where the first weights come from, if from another run
        self._unread: Launched | None = None  # the step that was launched last, if its row is still to come
        self._judge = Judge(settings.spike)
        self._profiler = Profiler(self.folder, settings.profiled_steps, ranks.device) if ranks.world.is_first else None
        self._lead_said_s = 0.0
        self._has_config = False  # rank 0: is config.toml written? What reads the run later needs it
        self._reporter: Reporter | None = None  # rank 0 has one, once the checkpoint is loaded
        self._shard_check: ShardCheck | None = None  # rank 0 has one, if data.verify_mb_per_s is not 0
        self._saver = Saver(
            self.folder / "checkpoints",
            ranks,
            held,
            settings.checkpoint,
            self._sync_rows,
            self._committed,
            regular=settings.checkpoint.every if settings.spike.factor else 0,
        )

    # --- from start to end -------------------------------------------------------------------------

    def run(self) -> int:
        self._warm_up()
        self._resume()
        on_first(self.ranks, self._report)
        self._remember()
        status = exit_codes.FAILED
        try:
            gc.collect()
            gc.freeze()
            gc.disable()
            reason = self._steps()
            self._watchdog.alive()
            progress = self.progress
            self._trace(leaving=True)
            finished = progress.step >= self.plan.total_steps and progress.pending is None
            if reporter := self._reporter:
                reporter.event("stop", step=progress.step, reason=reason.words or "finished")
            # Who is told to leave has no time for old checkpoints; the next attempt has.
            self._saver.tidy = finished
            problem = self._last_save()
            if problem:
                status, words = exit_codes.FAILED, f"the last checkpoint could not be written: {problem}"
            elif finished:
                status, words = exit_codes.FINISHED, "finished"
            else:
                status, words = exit_codes.AGAIN, reason.words
            if reporter:
                with self._watchdog.patience(LAST_WORDS_S):
                    self._has_config = self._has_config or self._keep_config()
                    reporter.leave(status, words, progress.step, saved=not problem)
        finally:
            gc.enable()
            self._watchdog.off()
            if self._shard_check:
                self._shard_check.close()
            if self._reporter:
                self._reporter.close(status)
        return status

    def _warm_up(self) -> None:
        started_at = time.monotonic()
        self.engine.warm_up()
        self._times["warm_up_s"] = time.monotonic() - started_at

    def _resume(self) -> None:
        """Load the newest valid checkpoint, if there is one, and make the folder fit it."""
        started_at = time.monotonic()
        settings, checkpoints = self.config, self.folder / "checkpoints"
        if self.held:
            retention.clean(checkpoints, self.held)
        newest = load.newest_valid(checkpoints, self.ranks, self.held)
        if newest is None:
            if settings.run.init_from:
                self._origin = init_from.load(Path(settings.run.init_from), self.engine.trained, self.ranks)
            torch.manual_seed(settings.run.seed + 7919 * self.ranks.world.rank)
        else:
            state = layout.read_state(newest)
            changed = plan.changes(state.identity, self.plan.identity)
            if changed:
                raise UserError(
                    f"{self.folder} was trained with other settings than these: {'; '.join(changed)}. Give the new run "
                    "another --run.name, or restore the settings"
                )
            self._changes = in_effect.since(state, self._in_effect, self.plan)
            if settings.run.strict:
                self._changes.refuse()
            self._load(newest)
            self._saver.loaded(newest)
        self._times["load_s"] = time.monotonic() - started_at

    def _load(self, path: Path) -> None:
        state = load.load(path, self.engine.trained, self.engine.optimizer, self.ranks)
        self.progress = Progress(state.step, state.pending, state.val_loss, state.skipped, state.rollbacks)
        if state.world_size != self.ranks.world.size:
            torch.manual_seed(self.config.run.seed + 7919 * self.ranks.world.rank + 104729 * state.step)

    def _report(self) -> None:
        """Rank 0: write what the folder is to hold, and begin to tell."""
        self._has_config = self._keep_config()
        save_load.save(self.words, self.folder / "tokenizer")
        took = [event.get("seconds", 0.0) for event in records.events(self.folder) if event["event"] == "save"]
        progress, pending = self.progress, self.progress.pending is not None
        story = Story(
            self.plan, self.ranks, self.number, self._hosts, self.engine.dtype, self._began_at, progress.step, pending
        )
        assert self.held is not None
        self._reporter = Reporter(story, self.held, self.engine.model, self.words)
        if self._origin:
            self._reporter.say(self._origin)
            self._reporter.event("init_from", words=self._origin)
        for line in self._changes.lines:
            self._reporter.say(line)
        if self._changes.found:
            self._reporter.event("changed", **self._changes.fields)
        for seconds in took[-RECENT_SAVES:]:
            self.flag.save_takes(seconds)
        self._reporter.event("ready", step=progress.step, **self._times)
        rate, more = self.config.data.verify_mb_per_s, progress.step < self.plan.total_steps
        if rate and more:
            self._shard_check = ShardCheck(self.plan.sets, self.folder, rate, self._reporter.event)

    def _keep_config(self) -> bool:
        return run_folder.keep_config(self.folder, self.number, sources.to_toml(self.config.from_anywhere))

    def _steps(self) -> Stop:
        """Step until the end or until told to stop; returns why."""
        self.flag.look_from_now()
        while self.progress.step < self.plan.total_steps or self.progress.pending:
            row = self.progress.pending or self._step()
            self.progress.pending = None
            if row:
                if self._due(self.config.eval.every, self.progress.step):
                    started_at = time.monotonic()
                    figures = self._evaluate()
                    if figures is None:
                        self.progress.pending = row
                        return self.flag.agree(self.ranks)
                    figures = metrics_file.finite(figures)
                    row |= figures | {"val/elapsed_s": time.monotonic() - started_at}
                    self.progress.val_loss = figures["val/loss"]
                if self._reporter:
                    self._reporter.row(row)
                    if "val/loss" in row and self.config.sample.tokens:
                        limit_s = sample_limit_s(self.config.sample.max_s, self._watchdog.limit_s)
                        self._reporter.sample(self.progress.step, limit_s, self._may_sample)
            reason = self._between(after_step=True)
            if reason:
                self._tell_unread()
                return reason
            if row and self._is_regular(self.progress.step):
                self._tell(self._save())
            self._sweep()
        return Stop.NO

    def _step(self) -> dict[str, Any] | None:
        """Launch the next step. Its row, if it is needed now; else the row of the one before is told meanwhile.

        None, too, where the loss has sent the run back.
        """
        if self._profiler:
            with only_informs("the trace"):
                self._profiler.before(self.progress.step + 1)
        launched = self.engine.launch(self.progress.step, self.progress.step + self.progress.skipped)
        if not self._tell_unread():
            return None
        self.progress.step, self.progress.val_loss = self.progress.step + 1, None
        step = self.progress.step
        self._watchdog.step(step)
        for straggler in self._blame.after(step):
            if self._reporter:
                self._reporter.straggler(step, straggler)
        self._trace(leaving=False)
        last = step == self.plan.total_steps
        if self.engine.reads_late and not (last or self._due(self.config.eval.every, step) or self._is_regular(step)):
            self._unread = launched
            return None
        return self._read(launched)

    def _trace(self, leaving: bool) -> None:
        with only_informs("the trace"):
            if self._profiler and (path := self._profiler.after(self.progress.step, leaving)) and self._reporter:
                self._reporter.say(f"traced until step {self.progress.step:,}: {path}")

    def _tell_unread(self) -> bool:
        """The row of the step before, if nobody has seen it yet; False if it sent the run back."""
        launched, self._unread = self._unread, None
        if launched is None:
            return True
        row = self._read(launched)
        if row and self._reporter:
            self._reporter.row(row)
        return row is not None

    def _read(self, launched: Launched) -> dict[str, Any] | None:
        """The row of a step that has been judged; None if it sent the run back. A collective where it went wrong."""
        row = self.engine.read(launched) | {"attempt": self.number}
        loss, norm = launched.figures.tolist()
        found = self._judge.of(row["step"], loss, norm, launched.outcome.skipped, lambda: self.engine.blame(launched))
        if found.words and self._reporter:
            self._reporter.say(found.words)
            self._reporter.event("spike" if found.spike else "nonfinite", step=row["step"], words=found.words)
        if found.fatal:
            raise DivergedError(f"{found.words}{found.fatal}")
        return None if found.spike and self._roll_back(launched, row) else row

    def _roll_back(self, launched: Launched, row: dict[str, Any]) -> bool:
        """Go back to the last regular checkpoint, without the samples since; False if there is none. A collective.

        A checkpoint that was saved because the run was told to leave is none to go back to: where a run goes must not
        depend on its interruptions. For the same reason nothing is noted for a later attempt before the next save: one
        that starts from the same checkpoint meets the same loss, and goes back again.
        """
        self._tell(self._saver.finish(self._watchdog.alive))
        with self._watchdog.patience(START_S):
            return self._roll_back_now(launched, row)

    def _roll_back_now(self, launched: Launched, row: dict[str, Any]) -> bool:
        spike, step = self.config.spike, row["step"]
        on_first(self.ranks, self._saver.await_removals)
        target = load.newest_valid(
            self.folder / "checkpoints", self.ranks, self.held, lambda saved: saved < step and self._is_regular(saved)
        )
        if target is None:
            if self._reporter:
                self._reporter.say("there is no checkpoint to go back to yet")
            return False
        rollbacks = self.progress.rollbacks + 1
        if rollbacks > spike.max_rollbacks:
            raise DivergedError(
                f"step {step:,}: another spike after {spike.max_rollbacks} rollbacks: try a lower optim.lr under "
                "another --run.name, or a larger spike.factor"
            )
        self._trace(leaving=True)  # its name tells of steps that come once
        on_first(self.ranks, lambda: self._saver.remove_beyond(layout.step_of(target)))
        self._load(target)
        self.progress.skipped, self.progress.rollbacks = launched.batch + 1 - self.progress.step, rollbacks
        self.progress.pending = None  # if it was, when that was saved: its row has been told since
        on_first(self.ranks, lambda: self._cut_off(row))
        if self._reporter:
            self._reporter.say(f"back to step {self.progress.step:,}, without the samples since")
        self._remember()
        return True

    def _cut_off(self, spiked: dict[str, Any]) -> None:
        assert self._reporter is not None
        self._reporter.roll_back(self.progress.step, spiked, self.progress.skipped)

    def _remember(self) -> None:
        """Tell the judge of the steps until here, from the rows that there are. A collective."""
        rows = list(on_first(self.ranks, lambda: self._reporter.metrics.tail if self._reporter else []))
        if self.progress.pending:  # its row is not in the file yet
            rows.append(self.progress.pending)
        self._judge.remember(rows)

    def _may_sample(self) -> bool:
        """Called for each token of a sample on rank 0: it is no hang, and ends when this rank is told to stop."""
        self._watchdog.alive()
        return self.flag.here() == Stop.NO

    def _sweep(self) -> None:
        """Collect garbage here, and not when Python feels like it: each rank would do so in another step."""
        step = self.progress.step
        if step % COLLECT_EVERY == 0 or self._due(self.config.eval.every, step):
            gc.collect()

    def _between(self, after_step: bool = False) -> Stop:
        """At each step boundary, and between the batches of an evaluation: what all ranks have to agree on."""
        self._watchdog.alive()
        if self._saver.busy:
            self._tell(self._saver.poll())
        reason = self.flag.agree(self.ranks, after_step)
        if after_step:
            self._mind_the_end()
        return reason

    def _is_regular(self, step: int) -> bool:
        """Is this step saved whatever happens? The last one is, too, but not here."""
        every = self.config.checkpoint.every
        return bool(every) and step % every == 0 and step < self.plan.total_steps

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.plan.total_steps)

    def _evaluate(self) -> dict[str, float] | None:
        terms = Terms(
            self.config.eval.batches,
            self.config.train.micro_batch,
            self._token_bytes,
            self.ranks,
            self.engine.precision,
            lambda: self._between() != Stop.NO,
        )
        return evaluate_all(self.engine.gathered(), self._held_out, terms)

    # --- saving ------------------------------------------------------------------------------------

    def _save(self) -> Saved | None:
        """Begin to save this step; the outcome, if it has one at once. The save before has to end first."""
        self._tell(self._saver.finish(self._watchdog.alive))
        progress = self.progress
        state = layout.State(
            progress.step,
            progress.step * self.plan.tokens_per_step,
            progress.step * self.config.train.global_batch,
            self.ranks.world.size,
            self.plan.identity,
            progress.pending,
            progress.val_loss,
            progress.skipped,
            progress.rollbacks,
            self._in_effect,
        )
        saved = self._saver.begin(state, tensors_of(self.engine.trained, self.engine.optimizer, self.ranks))
        if saved is None and not self.config.checkpoint.background:
            saved = self._saver.finish(self._watchdog.alive)
        return saved

    def _last_save(self) -> str:
        """Save this step before leaving; '' or why that failed, on every rank."""
        saved = self._save() or self._saver.finish(self._watchdog.alive)
        assert saved is not None
        self._tell(saved)
        return saved.problem

    def _tell(self, saved: Saved | None) -> None:
        """A save has ended, if one has. A failure costs a checkpoint, not the run."""
        if saved is None:
            return
        if self._reporter:
            self._reporter.saved(saved)
        if not saved.problem:  # one that failed at once says nothing of how long a whole one takes
            self.flag.save_takes(saved.seconds)

    def _mind_the_end(self) -> None:
        """Say it once where a step and its saves need more than the margin that was asked for, and when that grows."""
        lead_s = self.flag.lead_s
        if self._reporter and lead_s > max(self.config.requeue.end_margin_s, 1.5 * self._lead_said_s):
            self._lead_said_s = lead_s
            self._reporter.say(f"a step takes {self.flag.step_s:.1f} s: leaving {lead_s:.0f} s before the job's end")

    def _committed(self, saved: Saved) -> None:
        assert self._reporter is not None
        self._reporter.committed(saved)

    def _sync_rows(self) -> None:
        """Rows must be on the disk before the checkpoint that follows them: nobody would make them again."""
        assert self._reporter is not None
        self._reporter.metrics.sync()
