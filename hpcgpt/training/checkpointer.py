"""When a run is saved, and what the end of a save means for it.

A save runs in the background (``hpcgpt.checkpoint.save``): it begins at a step boundary, and ends at a later one. If it
fails, the run continues without this checkpoint. If the last save fails, the attempt fails.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.checkpoint.save import Saved, Saver, local_state_dict
from hpcgpt.distributed.stop_signals import StopFlag
from hpcgpt.distributed.world import Ranks
from hpcgpt.output import best_effort
from hpcgpt.plan import Plan
from hpcgpt.storage import atomic
from hpcgpt.storage.lease import Lease
from hpcgpt.training.engine import Engine
from hpcgpt.training.hang_watchdog import Watchdog
from hpcgpt.training.reporter import Reporter

RETRY_S = 1.0  # before the last save is tried again


@dataclass(kw_only=True)
class Checkpointer:
    """Saves `state` and the engine's tensors. Every rank has one; `save`, `poll`, `finish` and `last_save` are
    collectives. `lease` and `reporter` are None except on rank 0.
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
        """Return whether this step is saved because of checkpoint.every. Not the last: `last_save` saves it."""
        every = self.plan.config.checkpoint.every
        return bool(every) and step % every == 0 and step < self.plan.total_steps

    @property
    def pruner(self) -> Pruner:
        """Return the pruner. Rank 0 only."""
        assert self.saver.pruner is not None
        return self.saver.pruner

    def loaded(self, path: Path) -> None:
        """Start to remove old checkpoints: training continues from the one at `path`. No collective."""
        if self.lease:
            self.pruner.loaded(path)

    def save(self) -> None:
        """Begin to save this step, once the previous save has ended."""
        self._ended(self._begin())

    def poll(self, votes: Sequence[float] | None = None) -> None:
        """Advance the save that is under way, if any. Called at each step boundary; `votes`: see `Saver.poll`."""
        if self.saver.busy:
            self._ended(self.saver.poll(votes))

    def finish(self) -> None:
        """Wait for the save that is under way, if any."""
        self._ended(self.saver.finish(self.watchdog.alive))

    def last_save(self, prune_old: bool) -> str:
        """Save the last step; return '' or why that failed, on every rank. `prune_old`: then remove old checkpoints.

        It is tried twice, because no later save makes up for it: a disk or its server may have failed for a moment.
        """
        self.saver.prune_old = prune_old
        saved = self._begin() or self.saver.finish(self.watchdog.alive)
        assert saved is not None
        if saved.may_pass:
            self._ended(saved)
            time.sleep(RETRY_S)
            again = self._begin() or self.saver.finish(self.watchdog.alive)
            assert again is not None
            # It is there if only the flush of its folder had failed.
            saved = replace(again, existed=False, seconds=saved.seconds) if again.existed else again
        self._ended(saved)
        return saved.problem

    def _begin(self) -> Saved | None:
        """Begin a save; return its outcome if it has ended already."""
        self._ended(self.saver.finish(self.watchdog.alive, followed=True))
        state = layout.State(
            **vars(self.state),
            tokens=self.state.step * self.plan.tokens_per_step,
            samples=self.state.step * self.plan.config.train.global_batch,
            world_size=self.ranks.world.size,
            identity=self.plan.identity,
            in_effect=self.in_effect,
        )
        saved = self.saver.begin(state, local_state_dict(self.engine.model.gpt, self.engine.optimizer, self.ranks))
        if saved is None and not self.plan.config.checkpoint.background:
            saved = self.saver.finish(self.watchdog.alive)
        return saved

    def _ended(self, saved: Saved | None) -> None:
        """Report the end of a save, if it has ended."""
        if saved is None:
            return
        if self.reporter:
            self.reporter.saved(saved)
        # The time of a failed save is no estimate for the next one, nor is that of one with nothing to write.
        if not saved.problem and not saved.existed:
            self.stop.save_takes(saved.seconds)

    # Called from the saver's thread, on rank 0.

    def _committed(self, saved: Saved) -> None:
        assert self.reporter is not None
        self.reporter.committed(saved)

    def _flush_rows(self) -> None:
        """Flush the rows to the disk before their checkpoint becomes visible: a resume would not write them again.

        Rows that wait for room will be written, so the checkpoint waits with them. Whatever else is wrong with that
        file may last, and a missing row is cheaper than a missing checkpoint.

        Raises:
            OSError: the disk has no room.
        """
        assert self.reporter is not None
        try:
            self.reporter.metrics.sync()
        except Exception as error:
            if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
                raise
            best_effort.warn("metrics.jsonl", error)
