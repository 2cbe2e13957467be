"""benchmarks/gpu/campaign.py: on a CPU its parts run to their end, and what they find is on disk line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, clean_env


def campaign(folder: Path, part: str, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Run a part; return its exit status, and its findings by the name of the check."""
    words = [part, "--out", str(folder / "out"), "--scratch", str(folder / "scratch"), "--device", "cpu", "--small"]
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/campaign.py", *words, *options], cwd=ROOT, env=clean_env(), check=False
    )
    lines = (folder / "out" / f"{part}.jsonl").read_text().splitlines()
    return done.returncode, {found["check"]: found for found in map(json.loads, lines)}


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.timeout(1900)
def test_the_part_that_shows_what_works_finds_no_fault_on_a_cpu(tmp_path: Path) -> None:
    """Of the checks with the compiler only one, since each takes the compiler half a minute."""
    checks = (
        "eager", "compiled", "documents", "attention math", "attention cudnn", "one rank, fsdp", "one rank, zero1",
        "resume, eager, deterministic", "trace", "stop", "evaluate and sample",
    )  # fmt: skip
    status, found = campaign(tmp_path, "works", "--minutes", "30", "--only", *checks)
    assert {name: line["ok"] for name, line in found.items()} == dict.fromkeys(
        ("machine", "shards", *checks, "end"), True
    )
    assert status == 0
    assert found["one rank, fsdp"]["module"] == "FSDPGPT"
    assert found["attention cudnn"]["refused"].startswith("error: train.attention cudnn is for GPUs")
    assert found["documents"]["first_loss"] != found["eager"]["first_loss"], "no window has two documents"
    assert found["resume, eager, deterministic"]["same_with_an_empty_cache"] is True


@pytest.mark.processes
def test_a_fault_is_written_and_what_there_is_no_time_for_too(tmp_path: Path) -> None:
    status, found = campaign(tmp_path, "works", "--minutes", "0.001", "--only", "eager")
    assert status == 0
    assert {name: line["ok"] for name, line in found.items()} == {
        "machine": None, "shards": None, "eager": None, "end": True}  # fmt: skip
    (tmp_path / "scratch" / "shards_small").mkdir()
    (tmp_path / "scratch" / "shards_small" / "manifest.json").write_text("{")
    status, found = campaign(tmp_path, "works", "--minutes", "1", "--only", "eager")
    assert status == 1
    assert found["machine"]["torch"]
    assert "JSONDecodeError" in found["shards"]["error"]
    assert found["end"]["faults"] == 1
