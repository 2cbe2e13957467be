"""hpcgpt.training.profiler: traces of real steps, requested by the configuration or while a run is running."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from hpcgpt.exit_codes import FINISHED
from hpcgpt.training import profiler as profiler_module
from hpcgpt.training.profiler import Profiler
from tests.programs import command
from tests.tiny_run import curve, tensors

LAST = "checkpoints/step_000000012"


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = orjson.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return found


def count(path: Path, name: str) -> int:
    return sum(event.get("name") == name and event.get("ph") == "X" for event in events(path))


@pytest.mark.processes
def test_traced_steps_do_not_change_the_result(tiny: Path) -> None:
    runs = tiny.parent / "runs"
    done = command("hpcgpt.train", str(tiny), "--profile.steps", "3-4")
    assert done.returncode == FINISHED, done.stderr
    (trace,) = (runs / "tiny" / "profile").iterdir()
    assert trace.name == "steps_000000003_to_000000004.json.gz"
    assert f"traced until step 4: {trace}" in done.stdout
    assert count(trace, "Optimizer.step#AdamW.step") == 2
    assert count(trace, "aten::gelu") == 2 * 2 * 2  # steps, micro-steps, layers
    assert command("hpcgpt.train", str(tiny), "--run.name", "plain").returncode == FINISHED
    assert curve(runs / "tiny") == curve(runs / "plain")
    assert tensors(runs / "tiny" / LAST) == tensors(runs / "plain" / LAST)


@pytest.mark.processes
def test_a_range_beyond_the_end_is_traced_to_the_last_step(tiny: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--profile.steps", "11-20")
    assert done.returncode == FINISHED, done.stderr
    (trace,) = (tiny.parent / "runs" / "tiny" / "profile").iterdir()
    assert trace.name == "steps_000000011_to_000000012.json.gz"
    assert count(trace, "Optimizer.step#AdamW.step") == 2
    assert f"traced until step 12: {trace}" in done.stdout


@pytest.mark.processes
def test_a_request_in_the_run_folder_is_served_once(tiny: Path) -> None:
    run = tiny.parent / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "PROFILE").write_text("2\n")
    assert command("hpcgpt.train", str(tiny)).returncode == FINISHED
    found = sorted(path.name for path in (run / "profile").iterdir())
    assert found == ["PROFILE.step_000000001", "steps_000000001_to_000000002.json.gz"]
    assert (run / "profile" / found[0]).read_text() == "2\n"
    assert count(run / "profile" / found[1], "Optimizer.step#AdamW.step") == 2


@pytest.mark.parametrize("content", ["many", "0", "101", "-1", "1.5"])
def test_an_invalid_request_causes_a_warning(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "PROFILE").write_text(content)
    profiler = Profiler(tmp_path, range(0), torch.device("cpu"))
    profiler.before(5)
    assert profiler.after(5) == ""
    assert f"PROFILE contains '{content}', expected a number of steps from 1 to 100" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["PROFILE.step_000000005"]


def test_an_empty_request_to_a_running_run_means_three_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_module, "LOOK_EVERY_S", 0.0)
    profiler = Profiler(tmp_path, range(0), torch.device("cpu"))
    written = []
    for step in range(4, 10):
        if step == 5:
            (tmp_path / "PROFILE").touch()
        profiler.before(step)
        torch.ones(2, 2) @ torch.ones(2, 2)
        written.append(profiler.after(step))
    assert written == ["", "", "", f"{tmp_path}/profile/steps_000000005_to_000000007.json.gz", "", ""]
    assert count(Path(written[3]), "aten::mm") == 3


def test_a_trace_that_cannot_be_written_causes_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiler = Profiler(tmp_path, range(1, 2), torch.device("cpu"))
    profiler.before(1)
    assert profiler.after(1) == ""
    assert "is not written: " in capsys.readouterr().err


def test_recording_a_gpus_memory_ends_with_the_traced_steps_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU: it checks the calls to torch, not their effect."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **named: calls.append(named))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).touch())
    monkeypatch.setattr(profiler_module, "profile", lambda **_: profile(activities=[ProfilerActivity.CPU]))
    profiler = Profiler(tmp_path, range(1, 2), torch.device("cuda"))
    profiler.before(1)
    assert Path(profiler.after(1)).with_name("steps_000000001_to_000000001.memory").exists()
    assert [named.get("enabled", "on") for named in calls] == ["on", None]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/profile").write_text("in the way")
    profiler = Profiler(tmp_path / "run", range(1, 2), torch.device("cuda"))
    profiler.before(1)
    assert profiler.after(1) == ""
    assert [named.get("enabled", "on") for named in calls] == ["on", None] * 2


@pytest.mark.processes
@pytest.mark.parametrize("steps", ["x", "5-3", "1-", "-2", "1-2-3", "²"])
def test_invalid_step_ranges_are_refused(steps: str, tiny: Path) -> None:
    done = command("hpcgpt.train", str(tiny), f"--profile.steps={steps}")
    assert done.returncode == 2
    assert f"profile.steps '{steps}': expected a step or FIRST-LAST, as 100-102" in done.stderr
