"""hpcgpt.storage.safetensors_header: what the library finds in a file, and nothing that it would refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hpcgpt.checkpoint.safetensors_writer import DTYPES
from hpcgpt.storage import safetensors_header
from hpcgpt.storage.safetensors_header import BYTES, Entry, HeaderError

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entries(path: Path) -> list[Entry]:
    with open(path, "rb") as file:
        return safetensors_header.read(file.fileno(), path)


def write(path: Path, header: Any, after: int = 8) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(after))
    return path


def test_it_finds_what_the_library_has_written(tmp_path: Path) -> None:
    tensors = {f"a {name}": torch.arange(12).view(3, 4).to(dtype) for dtype, name in DTYPES.items()}
    tensors |= {"nothing": torch.empty(0, 3), "scalar": torch.tensor(7.0)}
    path = tmp_path / "library.safetensors"
    save_file(tensors, path, {"format": "pt"})
    found, content = entries(path), path.read_bytes()
    assert {entry.key for entry in found} == set(tensors)
    for entry in found:
        tensor = tensors[entry.key]
        assert (entry.dtype, entry.shape) == (DTYPES[tensor.dtype], tuple(tensor.shape))
        assert (
            content[entry.start : entry.start + entry.bytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )


def test_it_knows_the_dtypes_that_are_written() -> None:
    assert {name: dtype.itemsize for dtype, name in DTYPES.items()}.items() <= BYTES.items()


@pytest.mark.parametrize(
    ("header", "after", "found"),
    [
        (b"\xff{}", 8, "no valid header"),
        ([], 8, "no valid header"),
        ({"a": TENSOR}, 7, "not one after the other"),
        ({"a": TENSOR}, 9, "not one after the other"),
        ({"a": TENSOR, "b": TENSOR}, 8, "not one after the other"),
        ({"a": TENSOR | {"data_offsets": [0, 4]}}, 8, "at 0 to 4"),
        ({"a": TENSOR | {"data_offsets": [-8, 0]}}, 8, "at -8 to 0"),
        ({"a": TENSOR | {"dtype": "F4"}}, 8, "of dtype F4"),
        ({"a": TENSOR | {"shape": [2.0]}}, 8, "shape"),
        ({"a": TENSOR | {"shape": [2**32] * 200_000}}, 8, "a has 200,000 dimensions"),  # whose product takes a minute
        ({"a": TENSOR | {"shape": [2**63]}}, 8, "shape"),
        ({"a": {}}, 8, "no valid header"),
        (b"[" * 100_000, 8, "no valid header"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, header: Any, after: int, found: str) -> None:
    path = write(tmp_path / "wrong.safetensors", header, after)
    with pytest.raises(HeaderError, match=found):
        entries(path)


@pytest.mark.parametrize("length", [0, 7, 8, 12])
def test_a_file_that_ends_within_its_header_is_refused(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "short.safetensors", {"a": TENSOR})
    os.truncate(path, length)
    with pytest.raises(HeaderError, match=f"a header of [0-9]+ bytes in {length}"):
        entries(path)


def test_what_it_finds_is_what_the_library_finds_in_a_file_with_spaces(tmp_path: Path) -> None:
    path = write(tmp_path / "spaces.safetensors", json.dumps({"a": TENSOR}).encode() + b" " * 100)
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == [entry.key for entry in entries(path)]
