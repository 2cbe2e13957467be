"""Files that are whole or absent, also after a power cut.

A file is written under a temporary name beside its target, flushed to the disk, and renamed; then the folder is
flushed, since the new name is part of the folder's content. Temporary names start with a dot and contain host, pid
and a random number (two containers may share the first two), so two writers never use the same one, and a call removes
only its own. The umask decides the files' mode, so that a group can share a run.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hpcgpt.output import streams

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
COPY_BYTES = 64 << 20  # at a time
# Errors of link(2) on file systems without hard links, or without them for this file.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES, errno.EINVAL, errno.EXDEV)


@contextmanager
def writing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` if the block succeeds, and is removed if it raises.

    `check` is called when the file is complete, before it is renamed; an exception from it cancels the rename.

    Raises:
        OSError: the file could not be written; the message names it, and `path` is unchanged.
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
        with suppress(OSError):  # the disk is gone, which `error` says already
            temporary.unlink()
        # An error with a cause already names its file, one that was written inside this block.
        if isinstance(error, OSError) and error.filename is None and error.__cause__ is None:
            raise with_path_and_free_space(error, path) from error
        raise
    sync_folder(path.parent)


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that nothing reads yet, as in a folder that is later flushed (`flush`) and renamed as a whole.

    Raises:
        OSError: the file could not be written; the message names it.
    """
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        if error.filename is None and error.__cause__ is None:
            raise with_path_and_free_space(error, path) from error
        raise


def write(path: Path, content: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write `content` to `path`, or leave `path` unchanged and raise OSError. `check` as in `writing`."""
    with writing(path, check) as file:
        file.write(content)


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy the first `count` bytes of a file into a new one, by the file system itself where it can.

    Raises:
        OSError: there is no room for them, or the source has fewer.
    """
    left = count
    with suppress(OSError):  # not for these files: then read and write them, which fails where it must
        while left and (copied := os.copy_file_range(source.fileno(), target.fileno(), min(left, COPY_BYTES))):
            left -= copied
    while left:
        chunk = source.read(min(left, COPY_BYTES >> 4))
        if not chunk:
            raise OSError(errno.EIO, f"it ends {left:,} bytes too early")
        target.write(chunk)
        left -= len(chunk)


def remove_stale_temporaries(path: Path) -> None:
    """Remove the temporary files of writes to `path` that are under way on any host: their renames will fail.

    For a file whose other writers are all orphans.
    """
    for temporary in path.parent.glob(f".{path.name}.*.tmp"):
        temporary.unlink(missing_ok=True)


def keep(path: Path, content: bytes) -> None:
    """Write a file that a run can do without.

    If it has this content already nothing is written. If the disk has no room for a new version, the old one stays,
    with a warning.
    """
    before: bytes | None = None
    with suppress(OSError):  # absent, or unreadable, which writing may mend
        before = path.read_bytes()
    if before == content:
        return
    try:
        write(path, content)
    except OSError as error:
        if before is None or error.errno not in NO_ROOM:
            raise
        streams.warn(f"{path} is not updated: {error.strerror}")


def create(path: Path, content: bytes) -> bool:
    """Create `path` with its whole content unless it exists; return whether this call created it.

    Of several processes on any hosts exactly one gets True: a hard link is created or fails, also on network file
    systems without locks. Where there are no hard links (exFAT, object stores, some FUSE file systems) the file is
    created exclusively under its own name, and read back: see `_create_in_place`.
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
            # On NFS the link may be ours: the reply was lost, and the client repeated the request.
            return os.stat(temporary).st_nlink > 1
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not _create_in_place(path, content):
                return False
    except OSError as error:
        raise with_path_and_free_space(error, path) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)
    return True


def claim(path: Path, content: bytes) -> bool:
    """Create a file of which only the name matters: if the disk has no room for its content it is left empty.

    `content` differs from that of any other process.
    """
    try:
        return create(path, content)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
    with suppress(FileNotFoundError):
        if path.read_bytes() == content:  # ours: it was created, and then its folder could not be flushed
            sync_folder(path.parent)
            return True
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    except OSError as error:
        raise with_path_and_free_space(error, path) from error
    sync_folder(path.parent)
    return True


def _create_in_place(path: Path, content: bytes) -> bool:
    """Create a file without a link. For a moment it exists and is empty.

    A client that sends data only when the file is closed (gcsfuse) may let two processes create it, and refuse all but
    one at the close; so the content that is read back decides. It must differ from that of any other process.
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
                return False  # another process's
            path.unlink()
        raise
    return path.read_bytes() == content


def _temporary(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.{ending}")


def flush(path: Path) -> None:
    """Flush a file's content to the disk. An OSError names the file."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            raise with_path_and_free_space(error, path) from error


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def with_path_and_free_space(error: OSError, path: Path) -> OSError:
    """Return the same kind of error with the file's path and the free space of its disk in the message."""
    try:
        status = os.statvfs(path.parent)
        room = f"; {status.f_bavail * status.f_frsize / 1e6:,.1f} MB free there"
    except OSError:
        room = ""
    reason = error.strerror or str(error)
    return type(error)(error.errno, f"cannot write {path}: {reason}{room}")
