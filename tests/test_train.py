"""hpcgpt.train: one process from start to end, and across interruptions."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from tests.programs import ROOT, clean_env, command, on_ranks
from tests.tiny_run import TINY, curve, rows, tensors


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


# Dropout is on, so a generator that was not restored would show.
LONGER = ("--model.dropout", "0.1", "--train.steps", "240", "--eval.every", "80", "--checkpoint.every", "20")


@pytest.fixture(scope="module")
def whole(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 240 steps that was left alone; its configuration is whole/../../tiny.toml."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "tiny.toml"
    config.write_text(
        f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace("[run]", f'[run]\ndir = "{folder / "runs"}"')
    )
    done = command("hpcgpt.train", str(config), *LONGER, "--run.name", "whole")
    assert done.returncode == FINISHED, done.stderr
    return folder / "runs" / "whole"


def finish(whole: Path, name: str) -> None:
    """Go on with an interrupted run, which has to end with the bytes of the one left alone."""
    done = command("hpcgpt.train", str(whole.parents[1] / "tiny.toml"), *LONGER, "--run.name", name)
    assert done.returncode == FINISHED, done.stderr
    folder = whole.parent / name
    assert curve(folder) == curve(whole)
    last = "checkpoints/step_000000240"
    assert tensors(folder / last) == tensors(whole / last)


def test_each_signal_saves_the_step_and_the_next_start_goes_on_to_the_same_bytes(whole: Path) -> None:
    folder = whole.parent / "cut"
    reasons = {signal.SIGUSR1: "the time limit is near", signal.SIGTERM: "told to terminate",
               signal.SIGINT: "interrupted"}  # fmt: skip
    for number in reasons:
        told = start(str(whole.parents[1] / "tiny.toml"), *LONGER, "--run.name", "cut")
        wait_for_rows(folder / "metrics.jsonl", more=10)
        told.send_signal(number)
        assert told.wait(60) == AGAIN
    ends = [event for event in run_folder.events(folder) if event["event"] == "end"]
    assert [end["reason"] for end in ends] == list(reasons.values())
    starts = [event["step"] for event in run_folder.events(folder) if event["event"] == "start"]
    assert starts == [0, *(end["step"] for end in ends[:-1])], "it did not go on where it was told to leave"
    finish(whole, "cut")


def test_sigkill_costs_the_steps_since_the_checkpoint_and_nothing_else(whole: Path) -> None:
    killed = start(str(whole.parents[1] / "tiny.toml"), *LONGER, "--run.name", "killed")
    wait_for_rows(whole.parent / "killed" / "metrics.jsonl", more=50)
    killed.kill()
    killed.wait(10)
    finish(whole, "killed")
    first, second = (event for event in run_folder.events(whole.parent / "killed") if event["event"] == "start")
    assert first["step"] == 0
    assert second["step"] >= 20
    assert second["step"] % 20 == 0


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
    flags = [str(tiny), "--schedule.kind", "constant", "--checkpoint.every", "0", "--train.dtype", "float64"]
    assert command("hpcgpt.train", *flags, "--run.name", "whole").returncode == FINISHED
    for ranks, steps in ((2, 4), (1, 8), (4, 12)):
        elastic = ["hpcgpt.train", *flags, "--run.name", "elastic", "--train.steps", str(steps)]
        done = on_ranks(ranks, *elastic) if ranks > 1 else command(*elastic)
        assert done.returncode == FINISHED, done.stderr
        last = tensors(tmp_path / "runs" / "elastic" / "checkpoints" / f"step_{steps:09d}")
        states = [last[f"rng/{rank}/cpu"] for rank in range(ranks)]
        assert len(set(states)) == ranks, "ranks would draw the same dropout"
    folder = tmp_path / "runs" / "elastic"
    assert [event["world_size"] for event in run_folder.events(folder) if event["event"] == "start"] == [2, 1, 4]
    whole = rows(tmp_path / "runs" / "whole" / "metrics.jsonl")
    elastic_rows = rows(folder / "metrics.jsonl")
    assert [(row["step"], row["samples"]) for row in elastic_rows] == [(row["step"], row["samples"]) for row in whole]
    # Wrong samples change the third digit; the order of additions, in float64, the fifteenth.
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in elastic_rows] == pytest.approx([row[key] for row in whole], rel=1e-10)
