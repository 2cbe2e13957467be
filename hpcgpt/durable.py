"""Files that are whole or absent, also after a power cut.

A file is written under a temporary name beside its target, flushed to the disk, and renamed; then the
folder is flushed, since the new name is the folder's content. Temporary names start with a dot and
carry host and process, so two writers never share one, and only what this call made is ever removed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    `check` is called when it is whole and has not got its name yet: it may still say no by an exception.

    Raises:
        OSError: the file could not be written; the message names it, and `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
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


def create(path: Path, content: bytes) -> bool:
    """Make `path`, whole, unless it exists; True if this call made it.

    Of several processes on any hosts exactly one gets True: a hard link either appears or fails, also
    on network file systems that do not keep locks.
    """
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On NFS it may be our own: the answer was lost, and the client asked once more.
            return os.stat(temporary).st_nlink > 1
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    sync_folder(path.parent)
    return True


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
