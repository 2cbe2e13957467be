"""Files that are whole or absent, also after a power cut.

A file is written under a temporary name beside its target, flushed to the disk, and renamed; then the
folder is flushed, since the new name is the folder's content. Temporary names start with a dot and carry
host, process and a random number (two containers may share the first two), so two writers never share one, and
only what this call made is ever removed. Files get the mode that the umask leaves, for a group that shares a run.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What link(2) answers where a file system has none, or not for this file.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL, errno.EXDEV)


@contextmanager
def writing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    `check` is called when it is whole and has not got its name yet: it may still say no by an exception.

    Raises:
        OSError: the file could not be written; the message names it, and `path` is as it was.
    """
    temporary = _temporary(path, "tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a disk that is away: that is what `error` says already
            temporary.unlink()
        # With a cause it is explained already, by a file that was being written inside of this block.
        if isinstance(error, OSError) and error.filename is None and error.__cause__ is None:
            raise explained(error, path) from error
        raise
    sync_folder(path.parent)


@contextmanager
def plain(path: Path) -> Iterator[BinaryIO]:
    """A binary file that nobody relies on yet, as in a folder that will be flushed (`flush`) and renamed as a whole.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        if error.filename is None and error.__cause__ is None:
            raise explained(error, path) from error
        raise


def write(path: Path, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Make `path` hold `content`, or leave it as it was and raise OSError. `check` as in `writing`."""
    with writing(path, check) as file:
        file.write(content)


def forestall(path: Path) -> None:
    """Whoever is in the middle of writing `path`, on any host, will find that he cannot name it so any more.

    For a file of which all writers but the caller are orphans.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def keep(path: Path, content: bytes) -> None:
    """`write`, for what a run can do without: a file that holds just that already needs no room; and where there is
    none for another version of it, the one that is there stays, with a warning.
    """
    before: bytes | None = None
    with suppress(OSError):  # not there; or it cannot be read, which `write` may mend
        before = path.read_bytes()
    if before == content:
        return
    try:
        write(path, content)
    except OSError as error:
        if before is None or error.errno not in NO_ROOM:
            raise
        print(f"warning: {path} stays as it was: {error.strerror}", file=sys.stderr, flush=True)


def create(path: Path, content: bytes) -> bool:
    """Make `path`, whole, unless it exists; True if this call made it.

    Of several processes on any hosts exactly one gets True: a hard link either appears or fails, also on network
    file systems that do not keep locks. Where there are no hard links (exFAT, object stores, some FUSE file systems)
    the file is created exclusively under its own name, and read back: see `_create_in_place`.
    """
    if path.exists():
        return False
    temporary = _temporary(path, "new")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On NFS it may be our own: the answer was lost, and the client asked once more.
            return os.stat(temporary).st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _create_in_place(path, content):
                return False
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)
    return True


def claim(path: Path, content: bytes) -> bool:
    """`create` for a file whose name is what counts: it may stay empty where the disk has no room for its content."""
    try:
        return create(path, content)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise explained(error, path) from error
    sync_folder(path.parent)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """The same without a link. For a moment it is there and empty.

    A client that keeps what it writes to itself until the file is closed (gcsfuse) may tell two of them that they
    made it, and refuse all but one when they close; so what is there afterwards decides. `content` has to be unlike
    that of any other process.
    """
    try:
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    except OSError:
        with suppress(OSError):
            if path.read_bytes() not in (content, content[: path.stat().st_size]):
                return False  # another one's
            path.unlink()
        raise
    return path.read_bytes() == content


def _temporary(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.{ending}")


def flush(path: Path) -> None:
    """Flush the content of a file to the disk; raises OSError, naming it."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise explained(error, path) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> OSError:
    """The same kind of error, saying which file it was about and how much room its disk has."""
    try:
        status = os.statvfs(path.parent)
        room = f"; {status.f_bavail * status.f_frsize / 1e6:,.1f} MB free there"
    except OSError:
        room = ""
    reason = error.strerror or str(error)
    return type(error)(error.errno, f"cannot write {path}: {reason}{room}")
