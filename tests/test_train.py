"""hpcgpt.train: one process from start to end, with interruptions."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from tests.programs import Running, command, on_ranks
from tests.tiny_run import TINY, curve, rows, tensors

pytestmark = pytest.mark.processes


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


def test_a_second_start_of_a_finished_run_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny)).returncode == FINISHED
    folder = tmp_path / "runs" / "tiny"
    before = (folder / "metrics.jsonl").read_bytes(), tensors(folder / "checkpoints" / "step_000000012")
    second = command("hpcgpt.train", str(tiny))
    assert second.returncode == FINISHED
    assert "finished already" in second.stdout
    assert before == ((folder / "metrics.jsonl").read_bytes(), tensors(folder / "checkpoints" / "step_000000012"))


# With dropout, a random generator that was not restored would show.
LONGER = ("--model.dropout", "0.1", "--train.steps", "240", "--eval.every", "80", "--checkpoint.every", "20")


@pytest.fixture(scope="module")
def uninterrupted_run(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 240 steps; its configuration is ../../tiny.toml."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    config = folder / "tiny.toml"
    config.write_text(
        f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace("[run]", f'[run]\ndir = "{folder / "runs"}"')
    )
    done = command("hpcgpt.train", str(config), *LONGER, "--run.name", "uninterrupted")
    assert done.returncode == FINISHED, done.stderr
    return folder / "runs" / "uninterrupted"


def finish(uninterrupted_run: Path, name: str) -> None:
    """Continue an interrupted run, which has to end with the bytes of the uninterrupted one."""
    done = command("hpcgpt.train", str(uninterrupted_run.parents[1] / "tiny.toml"), *LONGER, "--run.name", name)
    assert done.returncode == FINISHED, done.stderr
    folder = uninterrupted_run.parent / name
    assert curve(folder) == curve(uninterrupted_run)
    last = "checkpoints/step_000000240"
    assert tensors(folder / last) == tensors(uninterrupted_run / last)


def test_each_signal_saves_the_step_and_the_next_start_ends_with_the_same_bytes(uninterrupted_run: Path) -> None:
    folder = uninterrupted_run.parent / "cut"
    reasons = {signal.SIGUSR1: "the time limit is near", signal.SIGTERM: "told to terminate",
               signal.SIGINT: "interrupted"}  # fmt: skip
    for number in reasons:
        config = str(uninterrupted_run.parents[1] / "tiny.toml")
        with Running("hpcgpt.train", config, *LONGER, "--run.name", "cut") as running:
            wait_for_rows(folder / "metrics.jsonl", more=10)
            running.send_signal(number)
            assert running.wait(60) == AGAIN
    ends = [event for event in run_folder.events(folder) if event["event"] == "end"]
    assert [end["reason"] for end in ends] == list(reasons.values())
    starts = [event["step"] for event in run_folder.events(folder) if event["event"] == "start"]
    assert starts == [0, *(end["step"] for end in ends[:-1])], "it did not continue from the step of the signal"
    finish(uninterrupted_run, "cut")


def test_sigkill_costs_only_the_steps_since_the_checkpoint(uninterrupted_run: Path) -> None:
    config = str(uninterrupted_run.parents[1] / "tiny.toml")
    with Running("hpcgpt.train", config, *LONGER, "--run.name", "killed"):
        wait_for_rows(uninterrupted_run.parent / "killed" / "metrics.jsonl", more=50)
    finish(uninterrupted_run, "killed")
    first, second = (
        event for event in run_folder.events(uninterrupted_run.parent / "killed") if event["event"] == "start"
    )
    assert first["step"] == 0
    assert second["step"] >= 20
    assert second["step"] % 20 == 0


def wait_for_rows(path: Path, more: int) -> None:
    """Wait until the file has `more` rows than now."""
    before = len(rows(path)) if path.exists() else 0
    deadline = time.monotonic() + 60
    while not path.exists() or len(path.read_bytes().splitlines()) < before + more:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def test_diverging_training_ends_before_it_is_saved(tiny: Path, tmp_path: Path) -> None:
    """The learning rate overflows: no checkpoint contains a NaN, and the status asks for the user."""
    done = command("hpcgpt.train", str(tiny), "--optim.lr", "1e30", "--schedule.warmup_steps", "6")
    assert done.returncode == 2
    assert "training has diverged" in done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert all(np.isfinite(row["train/loss"]) for row in rows(folder / "metrics.jsonl"))
    for checkpoint in (folder / "checkpoints").iterdir():
        assert all(np.isfinite(np.frombuffer(value, dtype=np.float32)).all()
                   for name, value in tensors(checkpoint).items() if name.startswith("model/"))  # fmt: skip


def test_a_run_continues_on_another_number_of_ranks_with_the_same_samples(tiny: Path, tmp_path: Path) -> None:
    """Two ranks, then one, then four: the curve of a run on one rank, up to the order of additions."""
    flags = [str(tiny), "--schedule.kind", "constant", "--checkpoint.every", "0", "--train.dtype", "float64",
             "--train.micro_batch", "2"]  # fmt: skip
    assert command("hpcgpt.train", *flags, "--run.name", "one_rank").returncode == FINISHED
    for ranks, steps in ((2, 4), (1, 8), (4, 12)):
        elastic = ["hpcgpt.train", *flags, "--run.name", "elastic", "--train.steps", str(steps)]
        done = on_ranks(ranks, *elastic) if ranks > 1 else command(*elastic)
        assert done.returncode == FINISHED, done.stderr
        last = tensors(tmp_path / "runs" / "elastic" / "checkpoints" / f"step_{steps:09d}")
        states = [last[f"rng/{rank}/cpu"] for rank in range(ranks)]
        assert len(set(states)) == ranks, "ranks would draw the same dropout"
    folder = tmp_path / "runs" / "elastic"
    assert [event["world_size"] for event in run_folder.events(folder) if event["event"] == "start"] == [2, 1, 4]
    one_rank_rows = rows(tmp_path / "runs" / "one_rank" / "metrics.jsonl")
    elastic_rows = rows(folder / "metrics.jsonl")
    assert [(row["step"], row["samples"]) for row in elastic_rows] == [
        (row["step"], row["samples"]) for row in one_rank_rows
    ]
    # Wrong samples change the third digit; the order of additions, in float64, the fifteenth.
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in elastic_rows] == pytest.approx([row[key] for row in one_rank_rows], rel=1e-10)
