"""What a safetensors file holds, and where: reads and checks its header.

The format (https://github.com/huggingface/safetensors, "Format"): the length N of the header, 8 bytes little-endian;
N bytes of JSON with dtype, shape and offsets of each tensor; then the tensors' bytes, one after the other.

Why not the library: it maps the whole file, which counts against a limit of a process's address space (``ulimit -v``,
Slurm's VSizeFactor), so that a checkpoint could only be resumed where all of a file fits.

No torch in here.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 100 << 20  # bytes of a header; the library's limit
MOST_DIMENSIONS = 64  # torch's limit: a product of millions of large numbers would take hours
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip # of a number of each dtype; those of less than a byte are unknown here


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its `bytes` bytes begin at `start`. `dtype` is one of `BYTES`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


class HeaderError(ValueError):
    """A file has no valid header."""


def read(descriptor: int, path: Path) -> list[Entry]:
    """Return the tensors of a file that is open, in the order of its bytes. `path` is for messages.

    Raises:
        OSError: it cannot be read.
        HeaderError: it is no safetensors file, or one with a dtype that is unknown here.
    """
    size = os.fstat(descriptor).st_size
    try:
        length = int.from_bytes(_bytes(descriptor, path, 0, min(8, size)), "little")
        if size < 8 or length > min(MOST, size - 8):
            raise ValueError(f"a header of {length:,} bytes in {size:,}")
        found = json.loads(_bytes(descriptor, path, 8, length))
        found.pop("__metadata__", None)
        entries = sorted((_entry(key, about, 8 + length) for key, about in found.items()), key=_place)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HeaderError(f"no valid header: {error}") from None
    ends = [8 + length, *(entry.start + entry.bytes for entry in entries)]
    if [entry.start for entry in entries] != ends[:-1] or ends[-1] != size:
        raise HeaderError("no valid header: its tensors are not one after the other")
    return entries


def _bytes(descriptor: int, path: Path, start: int, count: int) -> bytes:
    """Read `count` bytes from `start` on."""
    found = bytearray()
    while len(found) < count:
        try:
            more = os.pread(descriptor, count - len(found), start + len(found))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        if not more:
            raise ValueError(f"it ends before byte {start + count:,}")
        found += more
    return bytes(found)


def _entry(key: str, about: dict[str, Any], data: int) -> Entry:
    """Return what the header says of a tensor. `data`: where the first one begins."""
    if about["dtype"] not in BYTES:
        raise ValueError(f"{key} is of dtype {about['dtype']}")
    shape, (start, end) = tuple(about["shape"]), about["data_offsets"]
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{key} has {len(shape):,} dimensions")
    if not all(type(count) is int and 0 <= count < 2**63 for count in (*shape, start, end)):
        raise ValueError(f"{key} is of shape {shape} at {start} to {end}")
    entry = Entry(key, about["dtype"], shape, data + start)
    if end - start != entry.bytes:
        raise ValueError(f"{key} is of shape {shape} at {start} to {end}")
    return entry


def _place(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.bytes  # one without elements before the one that begins there
