"""A folder that gets its name when all of it is written and checked, or never.

It is made beside its target, ``.<name>.<host>-<pid>-<random>.tmp``; an export that was killed leaves one of these. A
target that exists is never touched. No torch in here.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcgpt.errors import UserError, cannot_read
from hpcgpt.storage import atomic


def check(target: Path) -> None:
    """Check that `target` can be made.

    Raises:
        UserError: it exists, or its parent cannot be made.
    """
    if target.is_symlink() or target.exists():
        raise UserError(f"{target} exists already: choose another OUT, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_read(error, f"{target.parent} cannot be made: {error.strerror}") from None


@contextmanager
def making(target: Path) -> Iterator[Path]:
    """Make a folder that becomes `target` if the block succeeds, and is removed if it raises.

    Raises:
        UserError: `target` exists.
        OSError: the folder cannot be written.
    """
    check(target)
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            (atomic.sync_folder if path.is_dir() else atomic.flush)(path)
        atomic.sync_folder(temporary)
        check(target)  # a rename would replace an empty folder
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    atomic.sync_folder(target.parent)
