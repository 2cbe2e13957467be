"""Removes old checkpoints while a run trains: at its start, before a save without room, after a save, at a rollback.

``hpcgpt.checkpoint.retention`` decides which ones; here is when, and in which thread. If a removal fails, the run
continues with less room. Rank 0 only.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path

from hpcgpt.checkpoint import layout, retention
from hpcgpt.checkpoint.retention import Unread
from hpcgpt.config import options
from hpcgpt.output import streams
from hpcgpt.storage import atomic
from hpcgpt.storage.lease import Lease

WAIT_S = 10.0  # limit for waiting until the start's removals end: a job that must stop has little time


class Pruner:
    """Removes the old checkpoints of a run. `regular`: see retention.prune."""

    def __init__(self, checkpoints: Path, lease: Lease, keep: options.Checkpoint, regular: int) -> None:
        self._checkpoints, self._lease, self._keep, self._regular = checkpoints, lease, keep, regular
        self._verified: set[str] = set()  # names of checkpoints whose checksums this process has compared
        self._removing = threading.Lock()
        self.is_tight = False  # a save has found no room: what the next one replaces is removed before it

    def loaded(self, path: Path) -> None:
        """Remove old checkpoints in a thread: training continues from `path`, whose checksums have been compared.

        Earlier attempts had no time to remove any after their last save.
        """
        self._verified.add(path.name)
        self._removing.acquire()

        def prune() -> None:
            try:
                retention.prune(self._checkpoints, self._keep, self._lease, self._verified, regular=self._regular)
            except OSError as error:
                _warn_not_removed(error)
            finally:
                self._removing.release()

        threading.Thread(target=prune, name="pruning", daemon=True).start()

    def wait(self) -> None:
        """Wait, for a bounded time, until the removals of `loaded` have ended."""
        if self._removing.acquire(timeout=WAIT_S):
            self._removing.release()

    def make_folder(self, temporary: Path, name: str, needed: int) -> None:
        """Make the folder for a save of `needed` bytes, which will be called `name`, and room for it if necessary.

        Raises:
            OSError: there is no room.
        """
        try:
            if self.is_tight or self._free() < needed:
                self.make_room(name)
            if self._free() < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.1f} MB needed")
            try:
                temporary.mkdir()
            except OSError as error:
                if error.errno not in atomic.NO_ROOM or not self.remake(temporary, name):
                    raise
        except OSError as error:
            raise atomic.with_path_and_free_space(error, temporary) from error

    def remake(self, temporary: Path, name: str) -> bool:
        """Make room for a save that found none while it wrote, and its folder anew; return False if there is none.

        What a user may still write, in bytes or in files, is not in the free space of the disk: only writing shows it.

        Raises:
            OSError: the folder cannot be made.
        """
        if not self.make_room(name):
            return False
        temporary.mkdir()
        return True

    def _free(self) -> int:
        status = os.statvfs(self._checkpoints)
        return status.f_bavail * status.f_frsize

    def make_room(self, name: str) -> bool:
        """Remove now what would be removed once the checkpoint `name` exists; never the last valid one.

        Return whether any was removed.
        """
        if not self._removing.acquire(timeout=WAIT_S):
            return False
        try:
            removed = retention.prune(self._checkpoints, self._keep, self._lease, self._verified, 1, self._regular)
        except OSError as error:
            _warn_not_removed(error)
            return False
        finally:
            self._removing.release()
        for path in removed:
            streams.warn(f"no room for {name}: {path.name} was removed first")
        return bool(removed)

    def saved(self, path: Path) -> None:
        """Forget that `path` was verified: after a rollback, the same step is saved again."""
        self._verified.discard(path.name)

    def unread(self) -> list[Unread]:
        """Return the checkpoints whose checksums must be compared before old ones are removed, with their parts."""
        return retention.unread(self._checkpoints, self._keep, self._verified)

    def prune_after_save(self, whole: set[str]) -> None:
        """Remove old checkpoints after a save. `whole`: names of those whose checksums the ranks have compared."""
        with self._removing:
            self._verified |= whole
            try:
                retention.prune_after_save(self._checkpoints, self._keep, self._lease, self._verified)
            except (OSError, ValueError) as error:
                _warn_not_removed(error)

    def remove_beyond(self, step: int) -> None:
        """Remove the checkpoints after `step`, to which the run goes back.

        Raises:
            OSError: one could not be removed.
        """
        for path in layout.found(self._checkpoints):
            if layout.step_of(path) > step:
                with suppress(FileNotFoundError):  # the thread of `loaded` may have removed it by now
                    retention.remove(path, self._lease)


def _warn_not_removed(error: Exception) -> None:
    streams.warn(f"old checkpoints were not removed: {error}")
