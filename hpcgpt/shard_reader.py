"""Reading shards: the tokens of a split as one long stream. The format is in ``hpcgpt.shards``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcgpt.shards import HEADER_BYTES, WIDTHS, Manifest, Shard, Tokens


@dataclass(frozen=True)
class Split:
    """The shards of one split as one long stream of tokens."""

    folder: Path
    name: str
    shards: list[Shard]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place in the stream of each shard's first token, and the length of the stream (n + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _maps(self) -> dict[int, Tokens]:
        return {}

    def read(self, start: int, count: int) -> Tokens:
        """Tokens start ... start + count - 1 of the stream (count,), from as many shards as it takes."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[number])
        part = self._map(number)[offset : offset + count]
        if len(part) == count:
            return part
        return np.concatenate([part, self.read(start + len(part), count - len(part))])

    def where(self, place: int) -> str:
        """The shard and the offset in it of a place in the stream, for messages."""
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        return f"{self.folder / self.shards[number].name}.bin, token {place - int(self.starts[number]):,}"

    def _map(self, number: int) -> Tokens:
        if number not in self._maps:
            self._maps[number] = open_tokens(self.folder / f"{self.shards[number].name}.bin")
        return self._maps[number]


def open_split(folder: Path, manifest: Manifest, name: str) -> Split:
    """One split of a data set, with the size of every shard checked against the manifest.

    Raises:
        ValueError: no such split, or a shard that is missing, truncated or too long.
    """
    shards = [shard for shard in manifest.shards if shard.split == name]
    if not shards:
        there = ", ".join(manifest.splits) or "nothing"
        raise ValueError(f"{folder} has no {name} shards (it has {there})")
    for shard in shards:
        check_size(folder, shard)
    return Split(folder, name, shards)


def check_size(folder: Path, shard: Shard) -> None:
    path = folder / f"{shard.name}.bin"
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise ValueError(f"{path}: the manifest lists it, but it can't be read: {error.strerror}") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise ValueError(f"{path} is {what}: {size:,} bytes, expected {shard.bytes:,}; make the shards again")


def open_tokens(path: Path) -> Tokens:
    """The tokens of a .bin file as a read-only memory map (n,).

    Raises:
        ValueError: not a token shard, or not of the size that its header tells.
    """
    size = os.stat(path).st_size
    header = np.fromfile(path, dtype="<i4", count=256) if size >= HEADER_BYTES else np.zeros(256, dtype="<i4")
    width = next((w for w in WIDTHS.values() if (w.magic, w.version) == (header[0], header[1])), None)
    if width is None:
        known = " or ".join(f"{w.magic}, {w.version}" for w in WIDTHS.values())
        raise ValueError(f"{path}: not a token shard: header {header[0]}, {header[1]}; expected {known}")
    if size != HEADER_BYTES + width.bytes * int(header[2]):
        raise ValueError(f"{path}: {size:,} bytes do not fit the {header[2]:,} tokens of its header")
    return np.memmap(path, dtype=width.dtype, mode="r", offset=HEADER_BYTES)
