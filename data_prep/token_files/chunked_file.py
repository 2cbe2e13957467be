"""Reading files of numbers piece by piece, in memory that does not grow with the file.

Files are read at a place (pread) and not mapped: mapped pages count as the process's own wherever memory is
limited, and a mapped file that somebody truncates meanwhile is a signal that kills, not an error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import Shard, Tokens, Width
from hpcgpt.errors import UserError

PIECE_TOKENS = 1 << 20


class File:
    """A file of numbers. Several threads may share one."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.bytes = os.fstat(descriptor).st_size

    def read(self, dtype: str, place: int, count: int) -> NDArray[Any]:
        """`count` numbers from byte `place` on (count,).

        Raises:
            UserError: the file ends before.
        """
        asked = count * np.dtype(dtype).itemsize
        parts, got = [], 0
        while got < asked and (part := os.pread(self._descriptor, asked - got, place + got)):
            parts.append(part)
            got += len(part)
        if got < asked:
            raise UserError(f"{self.path} ends at byte {place + got:,}, expected {place + asked:,} at least")
        return np.frombuffer(b"".join(parts), dtype=dtype)

    def pieces(self, dtype: str, place: int, count: int, piece: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """`count` numbers from byte `place` on, `piece` at a time at most, each with the number of its first one."""
        size = np.dtype(dtype).itemsize
        for first in range(0, count, piece):
            yield first, self.read(dtype, place + first * size, min(piece, count - first))


@contextmanager
def opened(path: Path) -> Iterator[File]:
    """A regular file to read from.

    Raises:
        UserError: it is missing, may not be read, or is a folder, a pipe or a device.
    """
    try:
        # Opening a pipe without O_NONBLOCK would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UserError(f"{path}: expected a file, and this is a folder, a pipe or a device")
        yield File(path, descriptor)
    finally:
        os.close(descriptor)


def of_shard(folder: Path, shard: Shard, width: Width) -> Iterator[tuple[int, Tokens]]:
    """The tokens of a shard, its size and header checked, each piece with the number of its first token.

    Raises:
        UserError: the shard is missing, or not what the manifest says.
    """
    shard_reader.check_size(folder, shard)
    with opened(folder / f"{shard.name}.bin") as file:
        check_header(file, shard, width)
        yield from file.pieces(width.dtype, shard_format.HEADER_BYTES, shard.tokens, PIECE_TOKENS)


def check_header(file: File, shard: Shard, width: Width) -> None:
    """Raises UserError for a .bin that is not of the width and number of tokens that the manifest says."""
    tokens = shard_reader.open_tokens(file.path)
    if tokens.dtype != np.dtype(width.dtype):
        raise UserError(f"{file.path}: its header says {tokens.dtype}, the manifest says {width.name}")
    if len(tokens) != shard.tokens:
        raise UserError(f"{file.path}: its header says {len(tokens):,} tokens, the manifest says {shard.tokens:,}")
