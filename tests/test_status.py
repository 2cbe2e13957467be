"""hpcgpt.status: how a run is going, from its folder alone."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import command, rows


def test_a_finished_run_is_told_in_words_and_in_json(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny)).returncode == 0
    folder = tmp_path / "runs" / "tiny"
    words = command("hpcgpt.status", str(folder))
    assert words.returncode == 0
    assert f"{folder}: finished (finished)\n  step 12 of 12" in words.stdout
    found = json.loads(command("hpcgpt.status", "--json", str(folder)).stdout)
    last = rows(folder / "metrics.jsonl")[-1]
    assert (found["state"], found["step"], found["checkpoint_step"], found["attempts"]) == ("finished", 12, 12, 1)
    assert found["val/bits_per_byte"] == last["val/bits_per_byte"]
    assert found["time_left_s"] == 0


def test_a_run_that_is_told_to_wait_is_saved_and_says_why(tiny: Path, tmp_path: Path) -> None:
    """An end that is near enough already: one step, and out."""
    assert command("hpcgpt.train", str(tiny), env={"SLURM_JOB_END_TIME": "1"}).returncode == 75
    found = json.loads(command("hpcgpt.status", "--json", str(tmp_path / "runs" / "tiny")).stdout)
    assert (found["state"], found["step"], found["total_steps"]) == ("saved", 1, 12)
    assert "time limit" in found["reason"]


def test_a_folder_without_a_run_is_a_mistake(tmp_path: Path) -> None:
    done = command("hpcgpt.status", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no run in {tmp_path}")
