"""Read files of numbers in chunks, so that memory does not grow with the file.

Files are read with pread and not memory-mapped. Mapped pages count as the process's memory where that is limited, and
if a mapped file is truncated while it is read, the process is killed by SIGBUS.
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

CHUNK_TOKENS = 1 << 20


class ChunkedFile:
    """A file of numbers, which several threads may read."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor
        self.bytes = os.fstat(descriptor).st_size

    def read(self, dtype: str, offset: int, count: int) -> NDArray[Any]:
        """Read `count` numbers from byte `offset` on (count,).

        Raises:
            UserError: the file ends before.
        """
        size = count * np.dtype(dtype).itemsize
        parts, got = [], 0
        while got < size and (part := os.pread(self._descriptor, size - got, offset + got)):
            parts.append(part)
            got += len(part)
        if got < size:
            raise UserError(f"{self.path} ends at byte {offset + got:,}, expected {offset + size:,} at least")
        return np.frombuffer(b"".join(parts), dtype=dtype)

    def chunks(self, dtype: str, offset: int, count: int, chunk: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield `count` numbers from byte `offset` on, at most `chunk` at a time, each with its first one's index."""
        size = np.dtype(dtype).itemsize
        for first in range(0, count, chunk):
            yield first, self.read(dtype, offset + first * size, min(chunk, count - first))


@contextmanager
def open_file(path: Path) -> Iterator[ChunkedFile]:
    """Open a regular file for reading.

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
        yield ChunkedFile(path, descriptor)
    finally:
        os.close(descriptor)


def shard_chunks(folder: Path, shard: Shard, width: Width) -> Iterator[tuple[int, Tokens]]:
    """Yield the tokens of a shard in chunks, each with its first token's index, after checking size and header.

    Raises:
        UserError: the shard is missing, or does not match the manifest.
    """
    shard_reader.check_size(folder, shard)
    with open_file(folder / f"{shard.name}.bin") as file:
        check_header(file, shard, width)
        yield from file.chunks(width.dtype, shard_format.HEADER_BYTES, shard.tokens, CHUNK_TOKENS)


def check_header(file: ChunkedFile, shard: Shard, width: Width) -> None:
    """Raise UserError unless the .bin has the token width and the number of tokens that the manifest says."""
    tokens = shard_reader.open_tokens(file.path)
    if tokens.dtype != np.dtype(width.dtype):
        raise UserError(f"{file.path}: its header says {tokens.dtype}, the manifest says {width.name}")
    if len(tokens) != shard.tokens:
        raise UserError(f"{file.path}: its header says {len(tokens):,} tokens, the manifest says {shard.tokens:,}")
