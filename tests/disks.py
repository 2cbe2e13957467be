"""A small real file system, a full one, and a user without root's rights."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a real file system of that size at `folder`. Skip the test where that is not possible."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-n", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True,
                             text=True, check=False) if os.geteuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip("a small disk needs root and the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-n", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Fill a disk to its last byte; return the file that does it."""
    path = folder / "filler"
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return path


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in which every user may write."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@contextmanager
def another_user() -> Iterator[None]:
    """Act as a user without root's rights within the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
