"""Shared by the tests of checkpoints: small real ones, written by the program's own saver, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import options
from hpcgpt.storage.lease import Lease, acquire

IDENTITY = {"model.n_layer": 2, "run.seed": 1, "digest of the shards": "abc"}
SHARE = "tensors_00000_of_00001.safetensors"
KEEP_ALL = options.Checkpoint(keep_last=1000)


@pytest.fixture
def lease(tmp_path: Path) -> Iterator[Lease]:
    """Lease 1 of the run in tmp_path."""
    taken = acquire(tmp_path, "")
    yield taken
    taken.release()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """An empty folder for checkpoints."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def three_checkpoints(checkpoints: Path, lease: Lease) -> Path:
    """The checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        assert save(checkpoints, step, lease) == ""
    return checkpoints


def save(folder: Path, step: int, lease: Lease, val_loss: float | None = None, size: int = 500,
         keep: options.Checkpoint = KEEP_ALL, pending: dict[str, Any] | None = None) -> str:  # fmt: skip
    """Save a checkpoint of two tensors; return '' or the problem."""
    import torch

    made = {"model/weight": torch.full((size,), float(step)), "rng/0/cpu": torch.get_rng_state()}
    state = State(step, step * 10, step, 1, IDENTITY, pending, val_loss)
    return save_tensors(folder, state, made, lease, keep)


def save_tensors(folder: Path, state: State, tensors: dict[str, Any], lease: Lease,
                 keep: options.Checkpoint = KEEP_ALL) -> str:  # fmt: skip
    """Save, and wait for the end; return '' or the problem."""
    from hpcgpt.checkpoint.save import Saver
    from tests.one_rank import ALONE

    saver = Saver(folder, ALONE, lease, keep)
    saved = saver.begin(state, tensors) or saver.finish(lambda: None)
    assert saved is not None
    return saved.problem


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": xxhash.xxh3_128(path.read_bytes()).hexdigest()}


def update_checksums(folder: Path, manifest: dict[str, Any] | None = None) -> None:
    """Make sizes, checksums and the manifest's digest fit again, as an attacker with knowledge of the format can."""
    path = folder / "manifest.json"
    manifest = manifest or json.loads(path.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            manifest["files"][name] = fingerprint(folder / name)
    write_manifest(folder, manifest)


def add_manifest(folder: Path) -> None:
    """Write the manifest of what is in the folder."""
    files = {path.name: fingerprint(path) for path in folder.iterdir()}
    (folder / "manifest.json").write_bytes(layout.manifest_bytes(files, 1))


def write_manifest(folder: Path, manifest: Any) -> None:
    """Write a manifest, whatever it contains, with a digest that fits."""
    if isinstance(manifest, dict):
        manifest.pop("digest", None)
        manifest["digest"] = layout._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip_byte(folder: Path) -> None:
    content = bytearray((folder / SHARE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARE).write_bytes(content)
