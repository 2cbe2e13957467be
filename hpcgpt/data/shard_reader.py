"""Reading shards: the tokens of a split as one long stream of any size. The format is in ``hpcgpt.data.shard_format``.

Shards are memory-mapped. A map takes a file descriptor and page tables (up to 4 MB for 2 GB of accessed pages), so a
process keeps only the ``most_maps()`` most recently used ones, over all of its data sets: 512, or a quarter of the file
descriptors that it may open (``ulimit -n``) if that is less. While a batch is assembled as many again may be open. With
10,000 shards it is no more; a shard whose map was closed is opened again.

A split that fits into half of the machine's memory is soon in the page cache, and the kernel's read-ahead helps. In a
larger one windows are read at random, and read-ahead is switched off: for each window of 2 KB it read 8 MB, in 5 ms
instead of 0.02.

The sizes of all shards are compared with the manifest once, by one rank for all ranks. Opening a shard compares header,
size and width again.
"""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcgpt.data.shard_format import HEADER_BYTES, WIDTHS, Manifest, Shard, Tokens, Width
from hpcgpt.errors import InputError, cannot_read

_MOST_MAPS = 512
_THREADS = 32  # a stat takes a millisecond on Lustre, most of it waiting for the server


@dataclass(frozen=True, eq=False)
class Split:
    """The shards of one split as one long stream of tokens."""

    folder: Path
    name: str
    shards: Sequence[Shard]
    width: Width

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """The position in the stream of each shard's first token, and the length of the stream (n + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def fits_in_memory(self) -> bool:
        return self.tokens * self.width.bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the shards, and the offsets in them (n,), of `positions` in the stream (n,)."""
        numbers = np.searchsorted(self.starts, positions, side="right") - 1
        return numbers, positions - self.starts[numbers]

    def read(self, start: int, count: int) -> Tokens:
        """Read tokens start ... start + count - 1 of the stream (count,), from as many shards as needed."""
        numbers, offsets = self.locate(np.array([start]))
        number, offset = int(numbers[0]), int(offsets[0])
        part = np.frombuffer(mapped()(self, number)[offset : offset + count], dtype=self.width.dtype)
        if len(part) == count:
            return part
        return np.concatenate([part, self.read(start + len(part), count - len(part))])

    def where(self, position: int) -> str:
        """Describe a position in the stream for error messages: the shard and the offset in it."""
        numbers, offsets = self.locate(np.array([position]))
        return f"{self.path(int(numbers[0]))}, token {int(offsets[0]):,}"

    def path(self, number: int) -> Path:
        return self.folder / f"{self.shards[number].name}.bin"


def open_split(folder: Path, manifest: Manifest, name: str, check_sizes: bool = True) -> Split:
    """Open one split of a data set; with `check_sizes` compare the size of every shard with the manifest.

    Raises:
        InputError: no such split, or a shard is missing, truncated or too long.
        OSError: a shard cannot be read.
    """
    shards = [shard for shard in manifest.shards if shard.split == name]
    if not shards:
        there = ", ".join(manifest.splits) or "nothing"
        raise InputError(f"{folder} has no {name} shards (it has {there})")
    if check_sizes:
        _check_sizes(folder, shards)
    return Split(folder, name, shards, manifest.width)


def _check_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    def check(part: Sequence[Shard]) -> None:
        for shard in part:
            check_size(folder, shard)

    threads = min(_THREADS, 1 + len(shards) // 64)
    share = -(-len(shards) // threads)
    with ThreadPoolExecutor(threads) as pool:
        # In order, so that of several bad shards always the first is reported.
        list(pool.map(check, [shards[i : i + share] for i in range(0, len(shards), share)]))


def check_size(folder: Path, shard: Shard) -> None:
    path = folder / f"{shard.name}.bin"
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise cannot_read(error, f"{path}: the manifest lists it, but it can't be read: {error.strerror}") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise InputError(f"{path} is {what}: {size:,} bytes, expected {shard.bytes:,}; make the shards again")


def open_tokens(path: Path, read_ahead: bool = True) -> Tokens:
    """Map the tokens of a .bin file: a read-only array (n,), which keeps the map open.

    Without `read_ahead` only the pages that are accessed are read.

    Raises:
        InputError: it can't be opened, is not a token shard, or does not have the size that its header says.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size >= HEADER_BYTES else b""
        if isinstance(content, mmap.mmap) and not read_ahead:
            content.madvise(mmap.MADV_RANDOM)
    except OSError as error:
        raise cannot_read(error, f"{path} can't be read: {error.strerror}") from None
    magic, version, tokens = np.frombuffer(content, dtype="<i4", count=3) if content else (0, 0, 0)
    width = next((w for w in WIDTHS.values() if (w.magic, w.version) == (magic, version)), None)
    if width is None:
        known = " or ".join(f"{w.magic}, {w.version}" for w in WIDTHS.values())
        raise InputError(f"{path}: not a token shard: header {magic}, {version}; expected {known}")
    if size != HEADER_BYTES + width.bytes * int(tokens):
        raise InputError(f"{path}: {size:,} bytes do not fit the {tokens:,} tokens of its header")
    return np.frombuffer(content, dtype=width.dtype, count=int(tokens), offset=HEADER_BYTES)


def document_starts(tokens: NDArray[Any], end_of_text: int) -> NDArray[np.bool_]:
    """Mark the first token of each document in windows of tokens (..., T): bool (..., T).

    Every document starts with the end-of-text id, and text never encodes to that id (``hpcgpt.tokenizer.save_load``),
    so the .idx is not needed. The first token of a window that starts within a document is not marked.
    ``np.cumsum(..., axis=-1)`` of the result numbers the documents of a window.
    """
    found: NDArray[np.bool_] = tokens == end_of_text
    return found


@cache
def most_maps() -> int:
    """Return how many shards this process keeps open; see the module's docstring."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_MAPS if soft == resource.RLIM_INFINITY else max(1, min(_MOST_MAPS, soft // 4))


@cache
def mapped() -> Callable[[Split, int], memoryview]:
    """Return the cached function (split, number of a shard) -> that shard's tokens.

    All splits share its cache, because they share the process's file descriptors.
    """
    return lru_cache(maxsize=most_maps())(_map)


def _map(split: Split, number: int) -> memoryview:
    shard, path = split.shards[number], split.path(number)
    tokens = open_tokens(path, read_ahead=split.fits_in_memory)
    if len(tokens) != shard.tokens or tokens.dtype != np.dtype(split.width.dtype):
        raise InputError(
            f"{path} holds {len(tokens):,} tokens of {tokens.dtype}, but the manifest lists {shard.tokens:,} of "
            f"{split.width.name}: make the shards again"
        )
    return tokens.data
