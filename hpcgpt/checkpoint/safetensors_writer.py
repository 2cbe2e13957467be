"""Writes and hashes a safetensors file in one pass.

The format (https://github.com/huggingface/safetensors, "Format"): the length N of the header, 8 bytes little-endian;
N bytes of JSON with dtype, shape and offsets of each tensor; then the tensors' bytes, one after the other.

Why not the library's own writer: it holds the interpreter lock during the whole write, which would stop training; it
turns the operating system's errors into strings; and the checksum would need a second pass. Reading uses the library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hpcgpt.storage import atomic

About = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a tensor
CHUNK = 8 << 20  # bytes; writing and hashing this much does not hold the interpreter lock

_DTYPES = {
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
    about = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_one_by_one(path, about, tensors.values())


def write_one_by_one(
    path: Path, about: Mapping[str, About], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write tensors that need not all be in memory: `tensors` yields them in the order of `about`. Else as `write`."""
    digest, size = xxhash.xxh3_128(), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for chunk in _chunks(about, tensors, metadata):
                unwritten = chunk
                while unwritten:
                    unwritten = unwritten[os.write(descriptor, unwritten) :]
                digest.update(chunk)
                size += len(chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise atomic.with_path_and_free_space(error, path) from error
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _chunks(
    about: Mapping[str, About], tensors: Iterable[Tensor], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    """Yield the bytes of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in about.items():
        end = start + byte_count((dtype, shape))
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    yield memoryview(len(text).to_bytes(8, "little") + text)
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
