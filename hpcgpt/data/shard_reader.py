"""Reading shards: the tokens of a split as one long stream, at any size. The format is in ``hpcgpt.data.shard_format``.

A shard is a memory map, and a map keeps a file descriptor and page tables (up to 4 MB where 2 GB were
touched). So a process holds the ``most_maps()`` that it used last, over all of its data sets together: 512,
or a quarter of the descriptors that it may have (``ulimit -n``), if those are fewer; and while it puts a batch
together as many again. 10,000 shards take no more than that; one that is used again after it was let go is
opened again. A split that fits into half of the machine's memory is soon all in it, and reading ahead gets it
there; of a larger one, where windows are drawn from all over it, reading ahead is lost on each: 8 MB for a
window of 2 KB and 5 ms instead of 0.02 were measured.

The sizes of all shards are compared with the manifest once, by one rank for all; whoever opens a shard
compares its header, its size and its width again.
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
_THREADS = 32  # a stat takes a millisecond on Lustre, and waits for nothing but the server


@dataclass(frozen=True, eq=False)
class Split:
    """The shards of one split as one long stream of tokens."""

    folder: Path
    name: str
    shards: Sequence[Shard]
    width: Width

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place in the stream of each shard's first token, and the length of the stream (n + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def fits_in_memory(self) -> bool:
        return self.tokens * self.width.bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards' numbers and the offsets in them (n,) of `places` in the stream (n,)."""
        numbers = np.searchsorted(self.starts, places, side="right") - 1
        return numbers, places - self.starts[numbers]

    def read(self, start: int, count: int) -> Tokens:
        """Tokens start ... start + count - 1 of the stream (count,), from as many shards as it takes."""
        numbers, offsets = self.locate(np.array([start]))
        number, offset = int(numbers[0]), int(offsets[0])
        part = np.frombuffer(mapped()(self, number)[offset : offset + count], dtype=self.width.dtype)
        if len(part) == count:
            return part
        return np.concatenate([part, self.read(start + len(part), count - len(part))])

    def where(self, place: int) -> str:
        """The shard and the offset in it of a place in the stream, for messages."""
        numbers, offsets = self.locate(np.array([place]))
        return f"{self.path(int(numbers[0]))}, token {int(offsets[0]):,}"

    def path(self, number: int) -> Path:
        return self.folder / f"{self.shards[number].name}.bin"


def open_split(folder: Path, manifest: Manifest, name: str, check_sizes: bool = True) -> Split:
    """One split of a data set; with `check_sizes` the size of every shard is compared with the manifest.

    Raises:
        UserError: no such split, or a shard that is missing, truncated or too long.
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
        # In order: of several bad shards it is always the first that is named.
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
    """The tokens of a .bin file (n,), read-only: a plain array over a memory map, which lives as long as it does.
    Without `read_ahead` nothing but the pages that are touched is read.

    Raises:
        UserError: it can't be opened, is no token shard, or not of the size that its header tells.
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
    """Where documents begin in windows of tokens (..., T): True at each first token of a document (..., T).

    Every document starts with the end-of-text id, and no text becomes that id (``hpcgpt.tokenizer.save_load``), so the
    tokens themselves tell what the .idx would, without another file. The first token of a window that begins
    within a document is not marked. ``np.cumsum(..., axis=-1)`` of it numbers the documents of a window.
    """
    found: NDArray[np.bool_] = tokens == end_of_text
    return found


@cache
def most_maps() -> int:
    """How many shards this process keeps open; see the module's docstring."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_MAPS if soft == resource.RLIM_INFINITY else max(1, min(_MOST_MAPS, soft // 4))


@cache
def mapped() -> Callable[[Split, int], memoryview]:
    """The function (split, number of a shard) -> that shard's tokens. It keeps those that were used last: all
    splits share it, as they share the process's descriptors.
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
