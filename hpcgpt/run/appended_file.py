"""The open file of metrics.jsonl, whose end one process writes for days.

Meanwhile the descriptor may stop being the file at that path. An editor, ``sed -i`` and rsync replace it: rows would go
into a file without a name. On NFS the server answers ESTALE then, and after a failover of its disks. So each write
first compares the two, and an error other than "no room" is answered by opening the path anew, once. What is lost are
rows that were written between the copy and its rename, or had not been flushed. No torch in here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hpcgpt.output import streams
from hpcgpt.storage import atomic


class AppendedFile:
    """The file at `path`, with bytes up to `end`. Not thread-safe. `descriptor` is -1 while none is open. Once it
    `has_ended`, the next attempt may write the same file, and it is not opened anew.
    """

    def __init__(self, path: Path, check: Callable[[], None], reopened: Callable[[], None]) -> None:
        """Prepare; the owner opens the file. After it was opened anew, `check` exits if a newer attempt writes it, and
        then `reopened` is called.
        """
        self.path, self._check, self._reopened = path, check, reopened
        self.descriptor, self.end = -1, 0
        self.has_ended = False

    def write(self, content: bytes) -> int:
        """Write the first bytes of `content` after the others; return how many.

        Raises:
            OSError: the disk has no room, or the file cannot be written after it was opened anew, either.
        """
        try:
            if not self.is_at_path():
                self.reopen()
            return self._write(content)
        except OSError as error:
            if error.errno in atomic.NO_ROOM:
                raise atomic.with_path_and_free_space(error, self.path) from error
        try:
            self.reopen()
            return self._write(content)
        except OSError as error:
            raise atomic.with_path_and_free_space(error, self.path) from error

    def _write(self, content: bytes) -> int:
        written = os.pwrite(self.descriptor, content, self.end)
        self.end += written
        return written

    def is_at_path(self) -> bool:
        """Return whether the open file is the one at the path; False if one of them cannot be looked at."""
        with suppress(OSError):
            return self.descriptor >= 0 and os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        return False

    def reopen(self) -> None:
        """Open the path anew, to write after what is there.

        Raises:
            OSError: it cannot be opened, or has ended; the descriptor stays as it was.
        """
        if self.has_ended:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(self.path))
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._check()  # after it was opened: what is written below is no newer attempt's
            end = os.fstat(descriptor).st_size
            # Someone's copy may end within a line. Where this process has written a part of one, the rest follows.
            if end not in (0, self.end) and os.pread(descriptor, 1, end - 1) != b"\n":
                end += os.pwrite(descriptor, b"\n", end)
        except OSError:
            os.close(descriptor)
            raise
        self.close()
        self.descriptor, self.end = descriptor, end
        streams.warn(f"{self.path} was replaced, or could not be written: it was opened anew")
        self._reopened()

    def close(self) -> None:
        """Close the file, if it is open. What is to be sure of its place on the disk was flushed before."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
