"""hpcgpt.tracking.tensorboard_process: event files in which each step is once, read by TensorBoard's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.storage import atomic
from hpcgpt.tracking.tensorboard_process import EventFiles
from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.filterwarnings("default")  # those of TensorBoard's own modules


def write(run: Path, steps: range, at: float, keep: int = 0, loss: float = 1.0) -> None:
    """Cut metrics.jsonl off after step `keep`, as a resume and a rollback do, and add rows."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(True)[:keep] if path.exists() else []
    rows = [{"step": step, "time": at + step / 100, "tokens": 64 * step, "train/loss": loss, "none": None,
             "train/skipped": True} for step in steps]  # fmt: skip
    atomic.write(path, "".join([*lines, *(json.dumps(row) + "\n" for row in rows)]).encode())


def sample(run: Path, step: int, at: float, text: str) -> None:
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": at + step / 100 + 0.001, "text": text}) + "\n")


def found(run: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """Return (step, value) of a curve, as TensorBoard shows it."""
    from tensorboard.util.tensor_util import make_ndarray

    return [(point.step, float(make_ndarray(point.tensor_proto))) for point in _read(run).Tensors(tag)]


def _read(run: Path) -> Any:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()


def test_curves_have_the_names_of_metrics_jsonl(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11), 100.0)
    files = EventFiles(tmp_path)
    files.update()
    files.close()
    assert sorted(_read(tmp_path).Tags()["tensors"]) == ["tokens", "train/loss"]
    assert found(tmp_path, "tokens") == [(step, 64.0 * step) for step in range(1, 11)]


def test_after_a_rollback_a_resume_and_kills_each_step_is_there_once_with_its_last_value(tmp_path: Path) -> None:
    """A rollback while one process follows; a kill inside a record; a resume; and going back further than before."""
    first = EventFiles(tmp_path)
    write(tmp_path, range(1, 21), 100.0)
    first.update()
    write(tmp_path, range(11, 31), 200.0, keep=10, loss=2.0)
    first.update()
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])  # killed: step 30 is not whole
    assert found(tmp_path) == [(step, 1.0 if step <= 10 else 2.0) for step in range(1, 30)]
    second = EventFiles(tmp_path)
    write(tmp_path, range(26, 36), 300.0, keep=25, loss=3.0)
    second.update()
    third = EventFiles(tmp_path)  # an attempt that begins and is killed at once
    third.update()
    assert len(found(tmp_path)) == 35
    write(tmp_path, range(6, 9), 400.0, keep=5, loss=4.0)
    fourth = EventFiles(tmp_path)
    fourth.update()
    assert found(tmp_path) == [(step, 1.0 if step <= 5 else 4.0) for step in range(1, 9)]
    for files in (first, second, third, fourth):
        files.close()


def test_rows_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    """Also one whose loss is not finite, which is null."""
    write(tmp_path, range(1, 1001), 100.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(True)
    lines[500] = lines[500].replace('"train/loss": 1.0', '"train/loss": null')
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    for _ in range(2):
        files = EventFiles(tmp_path)
        files.update()
        files.close()
    sizes = sorted(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())
    assert len(sizes) == 2
    assert sizes[0] < 200 < sizes[1]


def test_of_samples_only_those_of_rows_that_are_part_of_the_run_are_shown(tmp_path: Path) -> None:
    files = EventFiles(tmp_path)
    write(tmp_path, range(1, 21), 100.0)
    sample(tmp_path, 10, 100.0, "kept")
    sample(tmp_path, 20, 100.0, "obsolete")
    files.update()
    write(tmp_path, range(11, 21), 200.0, keep=10)
    sample(tmp_path, 20, 200.0, "<b>萧炎</b>\n# two")
    files.update()
    again = EventFiles(tmp_path)
    again.update()
    shown = [(item.step, item.tensor_proto.string_val[0].decode()) for item in _read(tmp_path).Tensors("sample/text")]
    assert shown == [(10, "    kept\n"), (20, "    <b>萧炎</b>\n    # two\n")]
    files.close()
    again.close()


@pytest.mark.processes
def test_the_process_writes_what_is_left_when_training_ends_or_dies(tmp_path: Path) -> None:
    write(tmp_path, range(1, 11), 100.0)
    command = [sys.executable, "-m", "hpcgpt.tracking.tensorboard_process", str(tmp_path), "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, env=clean_env()) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
    assert [step for step, _ in found(tmp_path)] == list(range(1, 11))
