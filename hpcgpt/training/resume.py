"""What a checkpoint means for a run: where a new attempt continues, and where a run goes back to when its loss
leaps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcgpt import plan
from hpcgpt.checkpoint import init_from, layout, load, retention
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.distributed.collectives import run_on_rank0
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import DivergedError, UserError
from hpcgpt.plan import Plan
from hpcgpt.storage.lease import Lease
from hpcgpt.training import in_effect
from hpcgpt.training.checkpointer import Checkpointer
from hpcgpt.training.engine import Engine
from hpcgpt.training.reporter import Reporter
from hpcgpt.training.spikes import SpikeDetector


@dataclass(frozen=True)
class Resumed:
    """Where an attempt continues: from the checkpoint at `path`, or (None) from the beginning.

    `changes`: what differs from the attempt that saved it. `origin`: where the first weights come from, in words, if
    from another run.
    """

    path: Path | None
    changes: in_effect.Changes
    origin: str = ""


class Restorer:
    """Loads checkpoints into the engine and the state. Every rank has one; `resume` and `load` are collectives."""

    def __init__(self, planned: Plan, ranks: Ranks, lease: Lease | None, engine: Engine, state: TrainState) -> None:
        """`lease` is rank 0's generation, None on the others."""
        self.plan, self.ranks, self.lease, self.engine, self.state = planned, ranks, lease, engine, state
        self.checkpoints = planned.config.run_folder / "checkpoints"

    def resume(self, now: dict[str, Any]) -> Resumed:
        """Load the newest valid checkpoint, or begin. `now`: what is in effect in this attempt.

        Raises:
            UserError: the run was trained with other settings, or `run.strict` refuses what has changed.
        """
        if self.lease:
            retention.recover_leftovers(self.checkpoints, self.lease)
        newest = load.newest_valid(self.checkpoints, self.ranks, self.lease)
        if newest is None:
            return Resumed(None, in_effect.Changes(0), self._begin())
        state = layout.read_state(newest)
        if changed := plan.changes(state.identity, self.plan.identity):
            raise UserError(
                f"{self.plan.config.run_folder} was trained with other settings than these: {'; '.join(changed)}. Give "
                "the new run another --run.name, or restore the settings"
            )
        changes = in_effect.since(state, now, self.plan)
        if self.plan.config.run.strict:
            changes.refuse()
        self.load(newest)
        return Resumed(newest, changes)

    def _begin(self) -> str:
        settings = self.plan.config.run
        origin = ""
        if settings.init_from:
            origin = init_from.load(Path(settings.init_from), self.engine.model.local, self.ranks)
        torch.manual_seed(settings.seed + 7919 * self.ranks.world.rank)
        return origin

    def load(self, path: Path) -> None:
        """Make a checkpoint's tensors, random generators and state those of this rank."""
        saved = load.load(path, self.engine.model.local, self.engine.optimizer, self.ranks)
        self.state.become(saved)
        if saved.world_size != self.ranks.world.size:
            torch.manual_seed(self.plan.config.run.seed + 7919 * self.ranks.world.rank + 104729 * saved.step)


class Rollback:
    """Goes back to the last regular checkpoint, without the samples since. All methods are collectives.

    A checkpoint that was saved because the run was told to leave is none to go back to: where a run goes must not
    depend on its interruptions. For the same reason nothing is noted for a later attempt before the next save: one
    that starts from the same checkpoint meets the same loss, and goes back again.
    """

    def __init__(
        self, restorer: Restorer, checkpointer: Checkpointer, spikes: SpikeDetector, reporter: Reporter | None
    ) -> None:
        self._restorer, self._checkpointer, self._spikes, self._reporter = restorer, checkpointer, spikes, reporter
        self._ranks, self._state = restorer.ranks, restorer.state

    def target(self, step: int) -> Path | None:
        """The checkpoint to go back to from a spike at `step`; None if there is none yet.

        Raises:
            DivergedError: the run has gone back as often as it may.
        """
        run_on_rank0(self._ranks, lambda: self._checkpointer.pruner.wait())
        found = load.newest_valid(
            self._restorer.checkpoints,
            self._ranks,
            self._restorer.lease,
            lambda saved: saved < step and self._checkpointer.is_regular(saved),
        )
        if found is None:
            if self._reporter:
                self._reporter.say("there is no checkpoint to go back to yet")
            return None
        limit = self._restorer.plan.config.spike.max_rollbacks
        if self._state.rollbacks >= limit:
            raise DivergedError(
                f"step {step:,}: another spike after {limit} rollbacks: try a lower optim.lr under "
                "another --run.name, or a larger spike.factor"
            )
        return found

    def to(self, target: Path, spiked: dict[str, Any], next_batch: int) -> None:
        """Continue from `target` with global batch `next_batch`; `spiked` is the row of the step that went wrong."""
        state, rollbacks = self._state, self._state.rollbacks + 1
        run_on_rank0(self._ranks, lambda: self._checkpointer.pruner.remove_beyond(layout.step_of(target)))
        self._restorer.load(target)
        state.skipped, state.rollbacks = next_batch - state.step, rollbacks
        state.pending = None  # if it was, when that was saved: its row has been reported since
        run_on_rank0(self._ranks, lambda: self._cut_off(spiked))
        self.replay_losses()

    def _cut_off(self, spiked: dict[str, Any]) -> None:
        assert self._reporter is not None
        self._reporter.roll_back(self._state.step, spiked, self._state.skipped)
        self._reporter.say(f"back to step {self._state.step:,}, without the samples since")

    def replay_losses(self) -> None:
        """Let the detector of spikes see the steps until here, from the rows that there are."""
        rows = list(run_on_rank0(self._ranks, lambda: self._reporter.metrics.tail if self._reporter else []))
        if self._state.pending:  # its row is not in the file yet
            rows.append(self._state.pending)
        self._spikes.replay(rows)
