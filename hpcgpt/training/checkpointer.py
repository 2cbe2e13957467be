"""When a run is saved, and what the end of a save means for it.

A save runs in the background (``hpcgpt.checkpoint.save``): it is begun at a step boundary, and ends at a later one. A
save that fails costs a checkpoint, not the run; only the last one's failure is one of the attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.checkpoint.save import Saved, Saver, local_state_dict
from hpcgpt.distributed.stop_signals import StopFlag
from hpcgpt.distributed.world import Ranks
from hpcgpt.plan import Plan
from hpcgpt.storage.lease import Lease
from hpcgpt.training.engine import Engine
from hpcgpt.training.hang_watchdog import Watchdog
from hpcgpt.training.reporter import Reporter


@dataclass(kw_only=True)
class Checkpointer:
    """Saves `state` and the engine's tensors. Every rank has one; `save`, `poll`, `finish` and `last_save` are
    collectives. `lease` and `reporter` are rank 0's, None on the others.
    """

    plan: Plan
    ranks: Ranks
    lease: Lease | None
    engine: Engine
    state: TrainState
    stop: StopFlag
    in_effect: dict[str, Any]
    watchdog: Watchdog
    reporter: Reporter | None

    def __post_init__(self) -> None:
        config = self.plan.config
        self.saver = Saver(
            config.run_folder / "checkpoints",
            self.ranks,
            self.lease,
            config.checkpoint,
            self._flush_rows,
            self._committed,
            regular=config.checkpoint.every if config.spike.factor else 0,
        )

    def is_regular(self, step: int) -> bool:
        """Is this step saved whatever happens? The last one is, too, but by `last_save`."""
        every = self.plan.config.checkpoint.every
        return bool(every) and step % every == 0 and step < self.plan.total_steps

    @property
    def pruner(self) -> Pruner:
        """Rank 0's."""
        assert self.saver.pruner is not None
        return self.saver.pruner

    def loaded(self, path: Path) -> None:
        """Training continues from this checkpoint: old ones may go. No collective."""
        if self.lease:
            self.pruner.loaded(path)

    def save(self) -> None:
        """Begin to save this step. The save before has to end first."""
        self._ended(self._begin())

    def poll(self) -> None:
        """At a step boundary: let a save that is under way proceed."""
        if self.saver.busy:
            self._ended(self.saver.poll())

    def finish(self) -> None:
        """Wait for the save that is under way, if one is."""
        self._ended(self.saver.finish(self.watchdog.alive))

    def last_save(self, prune_old: bool) -> str:
        """Save this step before the end; '' or why that failed, on every rank. `prune_old`: then remove old ones."""
        self.saver.prune_old = prune_old
        saved = self._begin() or self.saver.finish(self.watchdog.alive)
        assert saved is not None
        self._ended(saved)
        return saved.problem

    def _begin(self) -> Saved | None:
        """The outcome, if there is one at once."""
        self.finish()
        state = layout.State(
            **vars(self.state),
            tokens=self.state.step * self.plan.tokens_per_step,
            samples=self.state.step * self.plan.config.train.global_batch,
            world_size=self.ranks.world.size,
            identity=self.plan.identity,
            in_effect=self.in_effect,
        )
        saved = self.saver.begin(state, local_state_dict(self.engine.model.local, self.engine.optimizer, self.ranks))
        if saved is None and not self.plan.config.checkpoint.background:
            saved = self.saver.finish(self.watchdog.alive)
        return saved

    def _ended(self, saved: Saved | None) -> None:
        """Report a save that has ended, if one has."""
        if saved is None:
            return
        if self.reporter:
            self.reporter.saved(saved)
        if not saved.problem:  # one that failed at once says nothing of how long a whole one takes
            self.stop.save_takes(saved.seconds)

    # In the saver's thread, on rank 0.

    def _committed(self, saved: Saved) -> None:
        assert self.reporter is not None
        self.reporter.committed(saved)

    def _flush_rows(self) -> None:
        """Rows must be on the disk before the checkpoint that follows them: a resume would not make them again."""
        assert self.reporter is not None
        self.reporter.metrics.sync()
