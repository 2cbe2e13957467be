"""What the files of a checkpoint hold, and where: reads headers, and of tensors only the bytes that are asked for.

Where all ranks need the same tensors, each reads an equal share of their bytes, and they send each other what they have
read (`read_together`). So each byte is read once, however many ranks there are, and a rank opens few files.

One file is open at a time, and none is mapped: a rank needs neither descriptors nor memory in proportion to the files,
and a disk that fails raises OSError instead of killing the process.
"""

from __future__ import annotations

import itertools
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
import torch.distributed as dist
from torch import Tensor

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.safetensors_writer import DTYPES
from hpcgpt.distributed.collectives import gather_from_all
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import InputError
from hpcgpt.storage import safetensors_header
from hpcgpt.storage.safetensors_header import HeaderError

CHUNK = 64 << 20  # bytes that are read at a time, if they cannot be read to where they belong
ROUND = 64 << 20  # bytes that all ranks together send in a round of `read_together`
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, or `rows` of it (None: all). Its bytes begin at `start`.

    `start` is -1 for several adjacent ranges of rows that `merged` has joined: the file's header has each of them.
    """

    file: str
    key: str
    name: str
    rows: range | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def fits(self) -> bool:
        """Return whether there are as many rows as the name says."""
        return self.rows is not None and bool(self.rows) and self.shape[:1] == (len(self.rows),)


class Reader:
    """Reads files of a checkpoint. The file that was read last stays open until another one is read, or the end."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file:
            self._file.close()

    def _open(self, name: str) -> BinaryIO:
        if self._file is None or self._name != name:
            if self._file:
                self._file.close()
            self._file, self._name = open(self._folder / name, "rb", buffering=0), name  # noqa: SIM115 (__exit__)
        return self._file

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Read as many bytes as `into` has, uint8 (n,) on the CPU, from `start` on.

        Raises:
            OSError, InputError: they cannot be read, or the file ends before.
        """
        memory = into.numpy().data
        while memory:
            try:
                count = os.preadv(self._open(name).fileno(), [memory[:CHUNK]], start)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._folder / name)) from None
            if not count:
                raise InputError(f"{self._folder / name} ends before byte {start + len(memory):,}")
            memory, start = memory[count:], start + count

    def header(self, name: str) -> list[Stored]:
        """Return what a file holds, in the order of its bytes.

        Raises:
            OSError, InputError: it cannot be read, or is no file of ours.
        """
        path = self._folder / name
        try:
            found = safetensors_header.read(self._open(name).fileno(), path)
        except HeaderError as error:
            raise InputError(f"{path} has {error}") from None
        if other := next((one for one in found if one.dtype not in _DTYPES), None):
            raise InputError(f"{path}: {other.key} is of dtype {other.dtype}, expected one of {', '.join(_DTYPES)}")
        return [Stored(name, one.key, *layout.rows_of(one.key), _DTYPES[one.dtype], one.shape, one.start)
                for one in found]  # fmt: skip


def merged(stored: Iterable[Stored], which: Callable[[str], bool]) -> list[Stored]:
    """Join adjacent rows of the tensors in one file whose name is `which`.

    A file in which many ranks have stored their rows is then described in as few words as one of a single rank.
    """
    found: list[Stored] = []
    rows: dict[tuple[str, torch.dtype, tuple[int, ...]], list[Stored]] = {}
    for one in stored:
        if one.fits and which(one.name):
            rows.setdefault((one.name, one.dtype, one.shape[1:]), []).append(one)
        else:
            found.append(one)
    for parts in rows.values():
        parts.sort(key=_first_row)
        joined = [parts[0]]
        for one in parts[1:]:
            before = joined[-1]
            assert one.rows is not None
            assert before.rows is not None
            if before.rows.stop == one.rows.start:
                together = range(before.rows.start, one.rows.stop)
                joined[-1] = replace(before, rows=together, shape=(len(together), *one.shape[1:]), start=-1)
            else:
                joined.append(one)
        found += joined
    return found


def _first_row(stored: Stored) -> int:
    return stored.rows.start if stored.rows else 0


class Piece:
    """Bytes of a file from `start` on, of numbers of type `dtype`, which belong into all of `target`."""

    def __init__(self, file: str, start: int, target: Tensor, dtype: torch.dtype) -> None:
        self.file, self.start, self.bytes = file, start, target.numel() * dtype.itemsize
        self._target, self._dtype, self._missing = target, dtype, self.bytes
        self._copy: Tensor | None = None  # where the bytes are collected, if the target has another form

    def room(self, first: int, after: int) -> Tensor:
        """Return the memory of these bytes of the piece, uint8 (n,). Fill it, then call `filled`."""
        if self._copy is None:
            fits = self._target.dtype == self._dtype and self._target.is_contiguous()
            self._copy = self._target if fits else torch.empty(self._target.shape, dtype=self._dtype)
        return self._copy.reshape(-1).view(torch.uint8)[first:after]

    def filled(self, count: int) -> None:
        """Note that `count` more bytes are in place."""
        self._missing -= count
        if not self._missing and self._copy is not None and self._copy is not self._target:
            self._target.copy_(self._copy)
            self._copy = None


def in_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the pieces that have bytes, in the order in which they lie in the files."""

    def place(piece: Piece) -> tuple[str, int]:
        return piece.file, piece.start

    return sorted((piece for piece in pieces if piece.bytes), key=place)


@torch.no_grad()
def read(pieces: Iterable[Piece], reader: Reader) -> None:
    """Read the pieces. Raises as `Reader.read`."""
    for piece in in_order(pieces):
        for first in range(0, piece.bytes, CHUNK):
            room = piece.room(first, min(first + CHUNK, piece.bytes))
            here = room if room.device.type == "cpu" else torch.empty(len(room), dtype=torch.uint8)
            reader.read(piece.file, piece.start + first, here)
            if here is not room:
                room.copy_(here)
            piece.filled(len(room))


@torch.no_grad()
def read_together(pieces: Iterable[Piece], reader: Reader, ranks: Ranks) -> None:
    """Read pieces that are the same on all ranks, each byte once. A collective.

    Rank r reads the r-th part of all bytes, in rounds, and after each round the ranks send each other what they have
    read: at most ROUND bytes, which is all the memory that this takes.

    Raises:
        OSError, InputError: a rank could not read its part; raised on all ranks.
    """
    if ranks.cpu_group is None:
        return read(pieces, reader)
    needed, size = in_order(pieces), ranks.world.size
    starts = list(itertools.accumulate((piece.bytes for piece in needed), initial=0))
    total = starts[-1]
    part = -(-total // size)
    count = max(1, min(part, ROUND // size))
    # GPUs send each other bytes much faster than hosts do, where they can.
    on_gpu = dist.get_backend() == "nccl"
    device, group = (ranks.device, None) if on_gpu else (torch.device("cpu"), ranks.cpu_group)
    here = torch.zeros(count, dtype=torch.uint8)
    received = torch.empty(size * count, dtype=torch.uint8, device=device)
    problem: Exception | None = None
    for first in range(0, part, count):
        bounds = [(rank * part + first, min(rank * part + first + count, (rank + 1) * part, total))
                  for rank in range(size)]  # fmt: skip
        try:
            if problem is None:
                _read_part(needed, starts, bounds[ranks.world.rank], here, reader)
        except (OSError, InputError) as error:
            problem = error  # the others get no valid bytes from here, and hear of it in the end
        dist.all_gather(list(received.view(size, count).unbind()), here.to(device), group=group)
        for rank, (begin, end) in enumerate(bounds):
            at = rank * count
            for piece, a, b in _overlapping(needed, starts, begin, end):
                piece.room(a, b).copy_(received[at : at + b - a])
                piece.filled(b - a)
                at += b - a

    def outcome() -> None:
        if problem is not None:
            raise problem

    gather_from_all(ranks, outcome)
    return None


def _read_part(
    needed: Sequence[Piece], starts: Sequence[int], bounds: tuple[int, int], here: Tensor, reader: Reader
) -> None:
    """Read the bytes between `bounds`, counted over all pieces."""
    at = 0
    for piece, a, b in _overlapping(needed, starts, *bounds):
        reader.read(piece.file, piece.start + a, here[at : at + b - a])
        at += b - a


def _overlapping(
    needed: Sequence[Piece], starts: Sequence[int], begin: int, end: int
) -> Iterable[tuple[Piece, int, int]]:
    """Yield the pieces between two bytes, and which bytes of them: from the first to the one after the last."""
    number = bisect_right(starts, begin) - 1
    while begin < end:
        piece, start = needed[number], starts[number]
        after = min(end, start + piece.bytes)
        yield piece, begin - start, after - start
        begin, number = after, number + 1
