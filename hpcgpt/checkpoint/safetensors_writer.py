"""Writes and hashes a safetensors file in one pass.

The format is described in ``hpcgpt.storage.safetensors_header``, which reads it. Why not the library's own writer: it
holds the interpreter lock during the whole write, which would stop training; it turns the operating system's errors
into strings; and the checksum would need a second pass.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hpcgpt.checkpoint.parts import Place, padded
from hpcgpt.storage import atomic

About = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor
WIDTH = 15  # digits of an offset where ranks share a file: a million GB
CHUNK = 8 << 20  # bytes; writing and hashing this much does not hold the interpreter lock

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write `tensors`, all on the CPU and contiguous, and flush the file; return its ``bytes`` and ``xxh3``.

    Raises:
        OSError: the file could not be written; the message names it. It is left incomplete.
    """
    return write_one_by_one(path, _about(tensors), tensors.values())


def write_one_by_one(
    path: Path, about: Mapping[str, About], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write tensors that need not all be in memory: `tensors` yields them in the order of `about`. Else as `write`."""
    with _opened(path, os.O_EXCL) as descriptor:
        written = _write(descriptor, itertools.chain(_whole_header(about, metadata), _contents(about, tensors)))
        os.fsync(descriptor)
    return written


def share_bytes(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return how many bytes `write_share` writes: its share of the header, and the tensors."""
    about = _about(tensors)
    return padded(len(_header_share(about, 0)) + 10), sum(map(byte_count, about.values()))


def write_share(path: Path, tensors: Mapping[str, Tensor], place: Place) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write `tensors` and their share of the header into a file in which other ranks write, too: see `parts`.

    Return ``bytes`` and ``xxh3`` of the share of the header, and of the tensors. Raises as `write`.
    """
    about = _about(tensors)
    begin = (place.header_bytes - 8).to_bytes(8, "little") + b"{" if place.is_first else b","
    text = begin + _header_share(about, place.data)
    text = text.ljust(share_bytes(tensors)[0] - 1) + (b"}" if place.is_last else b" ")
    with _opened(path) as descriptor:  # whichever rank is the first makes the file
        os.lseek(descriptor, place.header, os.SEEK_SET)
        header = _write(descriptor, [memoryview(text)])
        os.lseek(descriptor, place.tensors, os.SEEK_SET)
        written = _write(descriptor, _contents(about, tensors.values()))
        os.fsync(descriptor)
    return header, written


def _about(tensors: Mapping[str, Tensor]) -> dict[str, About]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _header_share(about: Mapping[str, About], data: int) -> bytes:
    """Return the header's entries of tensors that begin at offset `data`, on which the length does not depend."""
    entries = _entries(about, data)
    return ", ".join(f"{json.dumps(name)}: {_of_fixed_width(entry)}" for name, entry in entries.items()).encode()


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """Return a descriptor to write with; errors get the path."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise atomic.with_path_and_free_space(error, path) from error


def _write(descriptor: int, chunks: Iterable[memoryview]) -> dict[str, Any]:
    """Write at the descriptor's position; return the ``bytes`` and ``xxh3`` of what was written."""
    digest, size = xxhash.xxh3_128(), 0
    for chunk in chunks:
        unwritten = chunk
        while unwritten:
            unwritten = unwritten[os.write(descriptor, unwritten) :]
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _whole_header(about: Mapping[str, About], metadata: Mapping[str, str] | None) -> Iterator[memoryview]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(header | _entries(about, 0)).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    yield memoryview(len(text).to_bytes(8, "little") + text)


def _entries(about: Mapping[str, About], start: int) -> dict[str, Any]:
    """Return the header's entries of tensors that begin at `start`."""
    entries = {}
    for name, (dtype, shape) in about.items():
        end = start + byte_count((dtype, shape))
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    return entries


def _of_fixed_width(entry: dict[str, Any]) -> str:
    """Return the JSON of a header's entry, whose length does not depend on the offsets."""
    start, end = entry["data_offsets"]
    return (
        f'{{"dtype": {json.dumps(entry["dtype"])}, "shape": {json.dumps(entry["shape"])}, '
        f'"data_offsets": [{start:{WIDTH}}, {end:{WIDTH}}]}}'
    )


def _contents(about: Mapping[str, About], tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """Yield the bytes of the tensors."""
    for tensor, expected in zip(tensors, about.values(), strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == expected
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for first in range(0, len(content), CHUNK):
            yield content[first : first + CHUNK]


def byte_count(about: About) -> int:
    """Return the bytes of a tensor."""
    dtype, shape = about
    return math.prod(shape) * dtype.itemsize


def fingerprint(content: bytes) -> dict[str, Any]:
    """Return ``bytes`` and ``xxh3`` of a small file with this content."""
    return {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
