"""hpcgpt.checkpoint.safetensors_writer: files that the safetensors library reads, flushed, and hashed while written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file

from hpcgpt.checkpoint import safetensors_writer
from tests.disks import small_disk
from tests.programs import ROOT, clean_env

EACH: dict[str, torch.Tensor] = {
    "f64": torch.randn(3, 5, dtype=torch.float64),
    "f32": torch.randn(7, 1),
    "f16": torch.randn(4).half(),
    "bf16": torch.randn(2, 2, 2).bfloat16(),
    "i64": torch.tensor([-1, 2**62]),
    "i32": torch.arange(6, dtype=torch.int32).view(2, 3),
    "u8": torch.get_rng_state(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    'name with "quotes"/ünïcode': torch.ones(1),
}


def test_the_library_reads_the_same_bytes_of_every_dtype_and_shape(tmp_path: Path) -> None:
    entry = safetensors_writer.write(tmp_path / "a", EACH)
    found = load_file(tmp_path / "a")
    assert set(found) == set(EACH)
    for name, tensor in EACH.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    content = (tmp_path / "a").read_bytes()
    assert entry == {"bytes": len(content), "xxh3": xxhash.xxh3_128(content).hexdigest()}
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
    with safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata() is None


def test_every_dtype_that_training_uses_can_be_written() -> None:
    assert set(safetensors_writer.DTYPES) >= {torch.float32, torch.float64, torch.bfloat16, torch.uint8}


def test_an_empty_share_makes_a_valid_file(tmp_path: Path) -> None:
    """As on a rank that has no tensors."""
    assert safetensors_writer.write(tmp_path / "a", {})["bytes"] == (tmp_path / "a").stat().st_size
    assert load_file(tmp_path / "a") == {}


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_tensors_larger_than_a_chunk_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    monkeypatch.setattr(safetensors_writer, "CHUNK", 4096)
    tensor = torch.arange(3 * 4096 + more, dtype=torch.int64).to(torch.uint8)
    entry = safetensors_writer.write(tmp_path / "a", {"a": tensor, "b": tensor[:5]})
    assert load_file(tmp_path / "a")["a"].equal(tensor)
    assert entry["xxh3"] == xxhash.xxh3_128((tmp_path / "a").read_bytes()).hexdigest()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:1000]))
    entry = safetensors_writer.write(tmp_path / "a", EACH | {"large": torch.randn(3000)})
    monkeypatch.undo()
    assert entry["xxh3"] == xxhash.xxh3_128((tmp_path / "a").read_bytes()).hexdigest()
    assert set(load_file(tmp_path / "a")) == {*EACH, "large"}


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("the user's")
    with pytest.raises(FileExistsError, match=f"cannot write {tmp_path / 'a'}: File exists"):
        safetensors_writer.write(tmp_path / "a", EACH)
    assert (tmp_path / "a").read_text() == "the user's"


def test_errors_name_the_file_and_the_free_space(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write .*/nowhere/a: No such file or directory"):
        safetensors_writer.write(tmp_path / "nowhere" / "a", EACH)
    refusal = r"cannot write .*/disk/a: No space left on device; 0\.0 MB free there"
    with small_disk(tmp_path / "disk", "64k") as disk, pytest.raises(OSError, match=refusal):
        safetensors_writer.write(disk / "a", {"a": torch.zeros(1 << 20)})


@pytest.mark.processes
def test_another_thread_runs_while_a_file_is_written(tmp_path: Path) -> None:
    """Training continues during a save: the GIL is released while files are written, flushed and hashed."""
    code = """
import json, sys, threading
from pathlib import Path
import torch
from hpcgpt.checkpoint import safetensors_writer
tensor = torch.zeros(64 << 20, dtype=torch.uint8)
work = threading.Thread(target=lambda: safetensors_writer.write(Path(sys.argv[1]), {"a": tensor}))
turns = 0
work.start()
while work.is_alive():
    turns += 1
print(json.dumps(turns))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert json.loads(done.stdout) > 100_000, "a pure-Python loop hardly ran"
