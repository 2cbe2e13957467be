"""What a checkpoint means for a run: where a new attempt continues, and where a run goes back to after a loss spike."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcgpt import plan
from hpcgpt.checkpoint import go_back, init_from, layout, load, retention
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.checkpoint.save import LONGEST_S
from hpcgpt.distributed.collectives import run_on_rank0
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import DivergedError
from hpcgpt.plan import Plan
from hpcgpt.storage.lease import Lease
from hpcgpt.training import in_effect
from hpcgpt.training.checkpointer import Checkpointer
from hpcgpt.training.engine import Engine
from hpcgpt.training.hang_watchdog import Watchdog
from hpcgpt.training.reporter import Reporter
from hpcgpt.training.spikes import SpikeDetector


@dataclass(frozen=True)
class Resumed:
    """Where an attempt continues: at the checkpoint `path`; None: at the beginning.

    `changes`: what differs from the attempt that saved it. `origin`: a message if the first weights come from another
    run, and `origin_step`: the step of its checkpoint. `notes`: messages on options that make the run go back, or that
    have no effect any more.
    """

    path: Path | None
    changes: in_effect.Changes
    origin: str = ""
    origin_step: int = 0
    notes: tuple[str, ...] = ()


class Restorer:
    """Loads checkpoints into the engine and the state. Every rank has one; `resume` and `load` are collectives.

    `lease` is None except on rank 0.
    """

    def __init__(
        self,
        planned: Plan,
        ranks: Ranks,
        lease: Lease | None,
        engine: Engine,
        state: TrainState,
        watchdog: Watchdog,
    ) -> None:
        self.plan, self.ranks, self.lease, self.engine, self.state = planned, ranks, lease, engine, state
        self._watchdog = watchdog
        self.checkpoints = planned.config.run_folder / "checkpoints"

    def resume(self, now: dict[str, Any]) -> Resumed:
        """Load the newest valid checkpoint, or initialize a new run. `now`: what is in effect in this attempt.

        Raises:
            UserError: the run was trained with other settings, or `run.strict` refuses a change.
        """
        with self.patience():
            if self.lease:
                retention.recover_leftovers(self.checkpoints, self.lease)
            back = self._go_back(now)
            self._watchdog.alive()
            newest = load.newest_valid(self.checkpoints, self.ranks, self.lease)
        if newest is None:
            return Resumed(None, in_effect.Changes(0), *self._initialize())
        changes = self._changes_since(newest, now)
        self.load(newest)
        notes = (back, init_from.not_read(self.plan.config.run))
        return Resumed(newest, changes, notes=tuple(note for note in notes if note))

    def _changes_since(self, checkpoint: Path, now: dict[str, Any]) -> in_effect.Changes:
        """Return what differs from the attempt that saved `checkpoint`; raise UserError if it must not differ so."""
        state = run_on_rank0(self.ranks, lambda: layout.read_state(checkpoint))
        plan.check_identity(self.plan.config, state.identity, self.plan.identity)
        changes = in_effect.since(state, now, self.plan)
        if self.plan.config.run.strict:
            changes.refuse()
        return changes

    def _go_back(self, now: dict[str, Any]) -> str:
        """Go back to `checkpoint.step`, unless that was done before; return a message, or ''.

        What would refuse a start there refuses it before anything is moved.
        """
        run, step = self.plan.config.run_folder, self.plan.config.checkpoint.step
        note, target = run_on_rank0(self.ranks, self._to_go_back_to)
        if target is None:
            return note
        go_back.refuse_damaged(target, load.problem_of(target, self.ranks))
        self._changes_since(target, now)

        def move() -> str:
            assert self.lease is not None
            return go_back.set_aside_newer(run, step, self.lease)

        return run_on_rank0(self.ranks, move)

    def _to_go_back_to(self) -> tuple[str, Path | None]:
        """Return a message, or '', and the checkpoint to go back to, if that is still to be done. Rank 0 only."""
        config, step = self.plan.config, self.plan.config.checkpoint.step
        if not step or not self.lease:
            return "", None
        if go_back.was_done(config):
            return (
                f"checkpoint.step {step}: this run has gone back there already and continues from its newest "
                f"checkpoint; to go back once more: hpcgpt checkpoint back {config.run_folder} --step {step}"
            ), None
        return "", go_back.target(config.run_folder, step)

    def _initialize(self) -> tuple[str, int]:
        """Load what `run.init_from` names, if anything, and seed the generators; return `origin` and `origin_step`."""
        settings = self.plan.config.run
        origin, step = "", 0
        if settings.init_from:
            optimizer = self.engine.optimizer if settings.init_optimizer else None
            with self.patience():
                source = init_from.load(self.plan.config, self.engine.model.gpt, optimizer, self.ranks)
            self.state.skipped = init_from.first_batch(source.state, self.plan.config, self.plan.identity)
            origin = source.message(self.state.skipped * self.plan.config.train.global_batch)
            step = source.state.step
        torch.manual_seed(settings.seed + 7919 * self.ranks.world.rank)
        return origin, step

    def patience(self) -> AbstractContextManager[None]:
        """Allow to read a checkpoint for as long as it may take to write one: that is no hang."""
        return self._watchdog.patience(LONGEST_S)

    def load(self, path: Path) -> None:
        """Load the tensors, random generators and state of a checkpoint.

        A generator whose state it lacks, as that of a GPU if the run was on CPUs, or all if the number of ranks was
        another, is seeded: differently on each rank, or all would draw the same masks for dropout.
        """
        settings, step = self.plan.config.run, layout.step_of(path)
        torch.manual_seed(settings.seed + 7919 * self.ranks.world.rank + 104729 * step)  # of all devices
        with self.patience():
            saved = load.load(path, self.engine.model.gpt, self.engine.optimizer, self.ranks)
        self.state.become(saved)


class Rollback:
    """Goes back to the last regular checkpoint, without the samples since. All methods are collectives.

    It never chooses a checkpoint that was saved because the job had to stop: the result must not depend on
    interruptions. For the same reason, a rollback is not recorded before the next checkpoint: an attempt that starts
    from the same one finds the same spike, and goes back again.
    """

    def __init__(
        self, restorer: Restorer, checkpointer: Checkpointer, spikes: SpikeDetector, reporter: Reporter | None
    ) -> None:
        self._restorer, self._checkpointer, self._spikes, self._reporter = restorer, checkpointer, spikes, reporter
        self._ranks, self._state = restorer.ranks, restorer.state

    def target(self, step: int) -> Path | None:
        """Return the checkpoint to go back to after a spike at `step`; None if there is none.

        Raises:
            DivergedError: the run has gone back spike.max_rollbacks times.
        """
        run_on_rank0(self._ranks, lambda: self._checkpointer.pruner.wait())
        with self._restorer.patience():
            found = load.newest_valid(
                self._restorer.checkpoints,
                self._ranks,
                self._restorer.lease,
                lambda saved: saved < step and self._checkpointer.is_regular(saved),
                required=False,
            )
        if found is None:
            if self._reporter:
                self._reporter.say("there is no valid regular checkpoint to go back to")
            return None
        limit = self._restorer.plan.config.spike.max_rollbacks
        if self._state.rollbacks >= limit:
            raise DivergedError(
                f"step {step:,}: another spike after {limit} rollbacks: try a lower optim.lr under "
                "another --run.name, or a larger spike.factor"
            )
        return found

    def to(self, target: Path, spiked: dict[str, Any], next_batch: int) -> None:
        """Continue from `target` with global batch `next_batch`; `spiked` is the row of the step with the spike."""
        state, rollbacks = self._state, self._state.rollbacks + 1
        run_on_rank0(self._ranks, lambda: self._checkpointer.pruner.remove_beyond(layout.step_of(target)))
        self._restorer.load(target)
        state.skipped, state.rollbacks = next_batch - state.step, rollbacks
        state.pending = None  # a row that was pending when `target` was saved has been reported since
        run_on_rank0(self._ranks, lambda: self._report(spiked))
        self.replay_losses()

    def _report(self, spiked: dict[str, Any]) -> None:
        """Report the rollback, which removes the later rows from metrics.jsonl. Rank 0 only."""
        assert self._reporter is not None
        self._reporter.roll_back(self._state.step, spiked, self._state.skipped)
        self._reporter.say(f"back to step {self._state.step:,}, without the samples since")

    def replay_losses(self) -> None:
        """Rebuild the history of the spike detector from the rows until this step."""
        rows = list(run_on_rank0(self._ranks, lambda: self._reporter.metrics.tail if self._reporter else []))
        if self._state.pending:  # this row is not in the file yet
            rows.append(self._state.pending)
        self._spikes.replay(rows)
