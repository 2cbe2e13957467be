"""data_prep.verify: in parallel, in chunks, and quickly. test_shard_format has the damage that it finds."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify
from hpcgpt.data import shard_format
from tests.data.test_shard_format import flip, write
from tests.data_prep.test_inspect import folder as folder  # a fixture
from tests.programs import ROOT, clean_env


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_any_number_of_workers_reports_the_same_in_the_same_order(
    workers: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CHUNK_TOKENS", 500)
    monkeypatch.setattr(verify, "CHUNK_DOCUMENTS", 2)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    manifest = shard_format.read_manifest(copy)
    assert verify.verify(copy, manifest, workers) == []
    flip(copy / "train_000000.bin", 2000)
    (copy / "train_000001.idx").unlink()
    flip(copy / "val_000000.idx", 50)
    found = verify.verify(copy, manifest, workers)
    assert [problem.partition(".")[0].rpartition("/")[2] for problem in found] == [
        "train_000000", "train_000001", "val_000000"]  # fmt: skip


def test_quick_checks_only_sizes_and_headers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    flip(copy / "train_000000.bin", 2000)
    assert verify.main([str(copy), "--quick"]) == 0
    assert "sizes and headers as the manifest says" in capsys.readouterr().out
    assert verify.main([str(copy), "--workers", "2"]) == 1
    assert "train_000000.bin: its checksum differs" in capsys.readouterr().err
    flip(copy / "train_000000.bin", 0)
    flip(copy / "train_000001.idx", 26)
    (copy / "val_000000.bin").write_bytes(b"")
    found = "\n".join(verify.verify(copy, shard_format.read_manifest(copy), quick=True))
    for message in ("train_000000.bin: not a token shard", "train_000001.idx: ", "val_000000.bin is truncated"):
        assert message in found
    with pytest.raises(ValueError, match="--workers 0: expected 1 or more"):
        verify.main([str(copy), "--workers", "0"])


@pytest.mark.parametrize("entry", ["length", "pointer", "border", "last border"])
def test_each_entry_of_an_index_is_checked_also_where_all_checksums_fit(entry: str, tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", {"train": [[[0, 1, 2], [0, 3], [0, 4, 5]]]})
    at = {"length": 34 + 4, "pointer": 34 + 4 * 3 + 8, "border": 34 + 12 * 3 + 8, "last border": 34 + 12 * 3 + 24}
    path = tmp_path / "shards" / "train_000000.idx"
    flip(path, at[entry])
    changed = dataclasses.replace(manifest.shards[0], idx_xxh3=shard_format.checksum(path))
    manifest = dataclasses.replace(manifest, shards=[changed])
    assert "its documents do not add up" in "\n".join(verify.verify(tmp_path / "shards", manifest))


@pytest.mark.processes
def test_verify_needs_no_more_memory_for_a_larger_shard(folder: Path, tmp_path: Path) -> None:
    """240 MB of zeros in a sparse file: reading it at once would show in the memory."""
    tokens = 120_000_000
    width = shard_format.WIDTHS["uint16"]
    with open(tmp_path / "train_000000.bin", "wb") as file:
        file.write(shard_format.header(width, tokens))
        file.truncate(1024 + 2 * tokens)
    index = shard_format.index(width, np.array([tokens]))
    (tmp_path / "train_000000.idx").write_bytes(index)
    xxh3, idx_xxh3 = (shard_format.checksum(tmp_path / f"train_000000.{suffix}") for suffix in ("bin", "idx"))
    shard = shard_format.Shard("train_000000", "train", tokens, 1, 1024 + 2 * tokens, xxh3, idx_xxh3, 0, 0, 0, 0)
    about = shard_format.read_manifest(folder).tokenizer | {"end_of_text": 0}
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    shard_format.write_manifest(tmp_path, "uint16", about, [], "by hand", {}, [shard])
    # Not ru_maxrss: that of a new process begins with its parent's.
    code = (
        "import sys; from pathlib import Path; from data_prep import verify\n"
        "def peak(): return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])\n"
        "before = peak(); assert verify.main(sys.argv[1:]) == 0; print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
                          env=clean_env(), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 50_000, "kilobytes"
