"""hpcgpt.train: one process from start to end, and across interruptions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clean_env, command, curve, rows, tensors, torchrun

from hpcgpt import runfolder
from hpcgpt.runfolder import AGAIN, FINISHED


def test_a_run_trains_evaluates_saves_and_finishes(tiny: Path, tmp_path: Path) -> None:
    done = command("hpcgpt.train", str(tiny))
    assert done.returncode == FINISHED, done.stderr
    folder = tmp_path / "runs" / "tiny"
    metrics = rows(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert [row["step"] for row in metrics if "val/loss" in row] == [6, 12]
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"]
    assert metrics[-1]["samples"] == 12 * 8
    assert metrics[-1]["tokens"] == 12 * 8 * 32
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_000000004", "step_000000008", "step_000000012"]  # fmt: skip
    assert "step 12/12" in done.stdout


def test_a_second_start_says_that_it_is_done_and_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny)).returncode == FINISHED
    folder = tmp_path / "runs" / "tiny"
    before = (folder / "metrics.jsonl").read_bytes(), tensors(folder / "checkpoints" / "step_000000012")
    again = command("hpcgpt.train", str(tiny))
    assert again.returncode == FINISHED
    assert "finished already" in again.stdout
    assert before == ((folder / "metrics.jsonl").read_bytes(), tensors(folder / "checkpoints" / "step_000000012"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_next_start_ends_with_the_same_bytes(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    """Dropout is on, so a generator that was not restored would show."""
    flags = [str(tiny), "--model.dropout", "0.1", "--train.steps", "150", "--eval.every", "50"]
    assert command("hpcgpt.train", *flags, "--run.name", "whole").returncode == FINISHED
    folder = tmp_path / "runs" / "cut"
    statuses = []
    for _ in range(3):
        interrupted = start(*flags, "--run.name", "cut")
        wait_for_rows(folder / "metrics.jsonl", more=10)
        interrupted.send_signal(number)
        statuses.append(interrupted.wait(60))
        if statuses[-1] != AGAIN:
            break
    assert statuses[0] == AGAIN
    assert command("hpcgpt.train", *flags, "--run.name", "cut").returncode == FINISHED
    whole = tmp_path / "runs" / "whole"
    assert curve(folder) == curve(whole)
    name = "checkpoints/step_000000150"
    assert tensors(folder / name) == tensors(whole / name)


def test_sigkill_costs_the_steps_since_the_checkpoint_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    flags = [str(tiny), "--model.dropout", "0.1", "--train.steps", "150", "--eval.every", "50"]
    assert command("hpcgpt.train", *flags, "--run.name", "whole").returncode == FINISHED
    folder = tmp_path / "runs" / "killed"
    killed = start(*flags, "--run.name", "killed")
    wait_for_rows(folder / "metrics.jsonl", more=30)
    killed.kill()
    killed.wait(10)
    assert command("hpcgpt.train", *flags, "--run.name", "killed").returncode == FINISHED
    assert curve(folder) == curve(tmp_path / "runs" / "whole")
    name = "checkpoints/step_000000150"
    assert tensors(folder / name) == tensors(tmp_path / "runs" / "whole" / name)


def start(*flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "hpcgpt.train", *flags], cwd=ROOT, env=clean_env(),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def wait_for_rows(path: Path, more: int) -> None:
    """Until the file has `more` rows than now."""
    before = len(rows(path)) if path.exists() else 0
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_bytes().splitlines()) < before + more:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def test_training_that_diverges_ends_before_anything_of_it_is_saved(tiny: Path, tmp_path: Path) -> None:
    """A learning rate that overflows: no checkpoint holds a NaN, and a person is asked for."""
    done = command("hpcgpt.train", str(tiny), "--optim.lr", "1e30", "--schedule.warmup_steps", "6")
    assert done.returncode == 2
    assert "training has diverged" in done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert all(np.isfinite(row["train/loss"]) for row in rows(folder / "metrics.jsonl"))
    for checkpoint in (folder / "checkpoints").iterdir():
        assert all(np.isfinite(np.frombuffer(value, dtype=np.float32)).all()
                   for name, value in tensors(checkpoint).items() if name.startswith("model/"))  # fmt: skip


def test_a_run_goes_on_with_another_number_of_ranks_and_sees_the_same_samples(tiny: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then four: the curve of a run that always had one, but for the order of additions."""
    flags = [str(tiny), "--schedule.kind", "constant", "--checkpoint.every", "0"]
    assert command("hpcgpt.train", *flags, "--run.name", "whole").returncode == FINISHED
    for ranks, steps in ((2, 4), (1, 8), (4, 12)):
        elastic = ["hpcgpt.train", *flags, "--run.name", "elastic", "--train.steps", str(steps)]
        done = torchrun(ranks, *elastic) if ranks > 1 else command(*elastic)
        assert done.returncode == FINISHED, done.stderr
    folder = tmp_path / "runs" / "elastic"
    assert [event["world_size"] for event in runfolder.events(folder) if event["event"] == "start"] == [2, 1, 4]
    whole = rows(tmp_path / "runs" / "whole" / "metrics.jsonl")
    elastic_rows = rows(folder / "metrics.jsonl")
    assert [(row["step"], row["samples"]) for row in elastic_rows] == [(row["step"], row["samples"]) for row in whole]
    # Wrong samples change the third digit. The corpus is this program, so each change of it rounds differently.
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in elastic_rows] == pytest.approx([row[key] for row in whole], rel=1e-4)
