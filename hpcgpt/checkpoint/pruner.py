"""Removing old checkpoints while a run trains: at its start, for a save that has no room, after a save, at a rollback.

Which ones go is decided by ``hpcgpt.checkpoint.retention``; here is when, and in which thread. A failure costs room,
not the run. Rank 0 only.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

from hpcgpt.checkpoint import layout, retention
from hpcgpt.config import options
from hpcgpt.output import streams
from hpcgpt.storage.lease import Lease

WAIT_S = 10.0  # how long a save waits for what the start removes: a job that is told to leave has little time


class Pruner:
    def __init__(self, checkpoints: Path, lease: Lease, keep: options.Checkpoint, regular: int) -> None:
        """`regular`: see retention.prune."""
        self._checkpoints, self._lease, self._keep, self._regular = checkpoints, lease, keep, regular
        self._verified: set[str] = set()  # the names of those that this process has read back
        self._removing = threading.Lock()

    def loaded(self, path: Path) -> None:
        """Training continues from this checkpoint, which has been read back. Remove old ones in a thread: those that
        earlier attempts made when they left, with no time to remove any.
        """
        self._verified.add(path.name)
        self._removing.acquire()

        def prune() -> None:
            try:
                retention.prune(self._checkpoints, self._keep, self._lease, self._verified, regular=self._regular)
            except OSError as error:
                _warn_that_old_ones_stay(error)
            finally:
                self._removing.release()

        threading.Thread(target=prune, name="pruning", daemon=True).start()

    def wait(self) -> None:
        """Wait, for a bounded time, for what `loaded` removes."""
        if self._removing.acquire(timeout=WAIT_S):
            self._removing.release()

    def make_room(self, name: str) -> None:
        """Remove now what would be removed once the checkpoint `name` is there; never the last valid one."""
        if not self._removing.acquire(timeout=WAIT_S):
            return
        try:
            gone = retention.prune(self._checkpoints, self._keep, self._lease, self._verified, 1, self._regular)
        except OSError as error:
            _warn_that_old_ones_stay(error)
            return
        finally:
            self._removing.release()
        for path in gone:
            streams.warn(f"no room for {name}: {path.name} was removed first")

    def saved(self, path: Path) -> None:
        """A new checkpoint is there, which has not been read back: after a rollback the same step comes once more."""
        self._verified.discard(path.name)

    def prune_after_save(self) -> None:
        """Remove what is not to stay beside a new checkpoint."""
        with self._removing:
            try:
                retention.prune_after_save(self._checkpoints, self._keep, self._lease, self._verified)
            except (OSError, ValueError) as error:
                _warn_that_old_ones_stay(error)

    def remove_beyond(self, step: int) -> None:
        """Remove the checkpoints of later steps, to which the run does not go back.

        Raises:
            OSError: one could not be removed.
        """
        for path in layout.found(self._checkpoints):
            if layout.step_of(path) > step:
                with suppress(FileNotFoundError):  # what a start removes may have waited for its disk until now
                    retention.remove(path, self._lease)


def _warn_that_old_ones_stay(error: Exception) -> None:
    streams.warn(f"old checkpoints stay: {error}")
