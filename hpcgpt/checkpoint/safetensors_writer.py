"""A safetensors file, written and hashed in one pass.

The format (https://github.com/huggingface/safetensors, "Format"): the length N of the header, 8 bytes little-endian;
N bytes of JSON that give each tensor's dtype, shape and place; then the tensors' bytes, one after the other.

Why not the library's own writer: it holds Python's interpreter lock for the whole write, which would stand the
training beside it still; it hides the operating system's errors in texts; and the checksum would need a second pass.
Reading is the library's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from hpcgpt.storage import atomic

PIECE = 8 << 20  # bytes; a write and a hash of this much run without the interpreter lock

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
    """Write `tensors`, all on the CPU and contiguous, flushed to the disk; returns ``bytes`` and ``xxh3``.

    Raises:
        OSError: the file could not be written; the message names it. What there is of it stays.
    """
    digest, size = xxhash.xxh3_128(), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for piece in _pieces(tensors):
                left = piece
                while left:
                    left = left[os.write(descriptor, left) :]
                digest.update(piece)
                size += len(piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise atomic.with_path_and_free_space(error, path) from error
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        end = place + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        content = tensor.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]


def fingerprint(content: bytes) -> dict[str, Any]:
    """The same of a small file's content."""
    return {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
