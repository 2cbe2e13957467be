"""hpcgpt.import_weights.stored: tensors in files that may come from anywhere."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hpcgpt.errors import UserError
from hpcgpt.import_weights import stored

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.ones(2).bool()}


def test_names_shapes_dtypes_and_contents_of_both_formats(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "pickled").mkdir()
    torch.save(WEIGHTS, tmp_path / "pickled" / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "pickled"):
        found = stored.of_folder(folder)
        assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
            "a": ((2, 3), torch.float32), "b": ((4,), torch.bfloat16), "c": ((2,), None),
        }  # fmt: skip
        assert all(torch.equal(found[name].read(), tensor) for name, tensor in WEIGHTS.items())


def test_the_format_of_torch_before_1_6_is_read_too(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    found = stored.of_state_dict(tmp_path / "old.pt", stored.pickled(tmp_path / "old.pt"))
    assert torch.equal(found["a"].read(), WEIGHTS["a"])


# --- files that were made to do harm ----------------------------------------------------------------


class Harm:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._command = f"touch {file}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def _in_zip(content: bytes, path: Path) -> None:
    """Write a file of torch.save whose pickle is `content`."""
    torch.save({}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, part in parts.items():
            file.writestr(name, content if name.endswith("data.pkl") else part)


@pytest.mark.parametrize("in_zip", [True, False])
def test_a_file_that_would_run_a_command_is_not_loaded(in_zip: bool, tmp_path: Path) -> None:
    harmed, path = tmp_path / "harmed", tmp_path / "ckpt.pt"
    content = pickle.dumps({"model": Harm(harmed), "model_args": {}}, protocol=2)
    if in_zip:
        _in_zip(content, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be loaded as weights alone"):
        stored.pickled(path)
    assert not harmed.exists()
    pickle.loads(content)  # the file is no dud
    assert harmed.exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"a": torch.zeros(1).expand(1 << 40)}, "a has shape (1099511627776,), and fewer numbers than that are stored"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is a torch.sparse_coo tensor"),
        ({"a": "text"}, "'a' is str, expected a tensor"),
        ({1: torch.zeros(1)}, "'1' is Tensor, expected a tensor"),
        ([torch.zeros(1)], "expected a dictionary of tensors, found list"),
        ({}, "expected a dictionary of tensors, found dict"),
    ],
)
def test_what_is_no_state_dict_of_weights_is_refused(content: Any, sentence: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError) as caught:
        stored.of_state_dict(tmp_path / "x.pt", stored.pickled(tmp_path / "x.pt"))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), b"\x80\x02." * 3, b"hello"])
def test_a_damaged_file_of_torch_save_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt"):
        stored.pickled(tmp_path / "x.pt")


def _header(about: Any, size: int = 8) -> bytes:
    text = json.dumps(about).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f" + b"{}", _header([]),
        _header({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}),
        _header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
        _header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
    ],
)  # fmt: skip
def test_a_damaged_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is no valid safetensors file"):
        stored.of_folder(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    names = {}
    for number, (name, tensor) in enumerate(WEIGHTS.items()):
        file = f"model-{number}.safetensors"
        save_file({name: tensor}, folder / file)
        names[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_shards_are_read_through_their_index(sharded: Path) -> None:
    found = stored.of_folder(sharded)
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            {"a": "../outside.safetensors"},
            "names '../outside.safetensors': expected a .safetensors or .bin file in the",
        ),
        ({"a": "/etc/passwd"}, "names '/etc/passwd': expected a .safetensors"),
        ({"a": "passwd"}, "names 'passwd': expected a .safetensors"),
        ({"a": "model-9.safetensors"}, "model-9.safetensors: No such file"),
        ({"z": "model-0.safetensors"}, "model-0.safetensors lacks z"),
        (
            {"b": "model-1.safetensors", "c": "more.safetensors"},
            "more.safetensors also has d, which the index does not",
        ),
        ({"a": "fifo.bin"}, "fifo.bin is no regular file"),
        ([], "is no index of shards"),
    ],
)
def test_an_index_that_does_not_fit_its_folder_is_refused(names: Any, sentence: str, sharded: Path) -> None:
    save_file({"a": torch.ones(1)}, sharded.parent / "outside.safetensors")
    save_file({"c": torch.ones(1), "d": torch.ones(1)}, sharded / "more.safetensors")
    os.mkfifo(sharded / "fifo.bin")
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError) as caught:
        stored.of_folder(sharded)
    assert sentence in str(caught.value)


def test_links_to_files_elsewhere_are_followed_as_hugging_faces_cache_has_them(sharded: Path) -> None:
    blob = sharded.parent / "blob"
    (sharded / "model-0.safetensors").rename(blob)
    (sharded / "model-0.safetensors").symlink_to(blob)
    assert torch.equal(stored.of_folder(sharded)["a"].read(), WEIGHTS["a"])


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither model\.safetensors, nor pytorch_model\.bin, nor an index"):
        stored.of_folder(tmp_path)
