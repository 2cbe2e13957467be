"""hpcgpt/estimate/__main__.py: `hpcgpt estimate`, from its flags to its text and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.estimate import __main__ as estimate
from hpcgpt.estimate import analytic, memory
from hpcgpt.estimate.account import Memory
from hpcgpt.estimate.probe import measure
from hpcgpt.estimate.request import Request
from hpcgpt.run import run_folder
from tests.estimate.probe.made import finished_probe
from tests.programs import command


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count instead of starting torch, which takes seconds: test_memory.py starts it."""

    def ask(_: memory.Estimator, request: Request) -> Memory:
        return analytic.measure(request, "counted by a test")

    monkeypatch.setattr(memory.Estimator, "ask", ask)


@pytest.fixture
def run_that_ended(finished_run: Path) -> Path:
    """The run of 12 steps, under another name than that of the function below."""
    return finished_run


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert estimate.main(words) == 0
    return capsys.readouterr().out


def test_a_run_whose_shards_exist(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--ranks", "2", str(tiny), "--rate", "5000")
    assert "2 x cpu" in out  # run.device is cpu
    assert "12 steps of 256 tokens" in out
    assert "5,000 tokens/s" in out
    assert "rank hours" in out


def test_json_has_every_figure(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--json", "--ranks", "2", str(tiny), "--gpu", "h100-80", "--run.device", "auto"))
    assert (found["ranks"], found["device"], found["steps"]) == (2, "h100-80", 12)
    assert found["memory"]["peak_bytes"] == sum(found["memory"]["parts"].values())
    assert found["fits"] is True
    assert found["would_fit"] == []
    assert 0 < found["mfu"] < 1
    assert found["disk"]["kept"] >= 1
    assert found["time"]["requeues"] == 0


def test_a_run_that_does_not_fit_is_shown_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--ranks", "8", "--gpu", "a100-40", "gpt2-1558m", "--train.micro_batch", "16")
    assert "does NOT fit" in out
    assert out.count("at the cost of") == 3


def test_requeues_within_a_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--ranks", "8", "--gpu", "h100-80", "--time", "30", "--rate", "2e6", "gpt2-124m")
    assert "within a limit of 30 min: 3 requeues" in out


def test_without_shards_the_vocabulary_is_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "--gpu", "h100-80", "gpt2-124m", "--data.dir", str(tmp_path))
    assert f"note: {tmp_path} has no shards yet: 50,257 ids are assumed" in out
    assert "124,439,808 parameters" in out


def test_steps_that_are_done_take_no_time(run_that_ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, f"{run_that_ended}/config.toml", "--train.steps", "24", "--rate", "256")
    assert "12 steps done already: times are those of the others" in out
    assert "12 s of training, 1 s a step" in out


def test_epochs_need_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the length of train\.epochs is not known"):
        estimate.main(["--data.dir", str(tmp_path), "--train.epochs", "2"])


def test_a_batch_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch 512 is not a multiple of 7 ranks"):
        estimate.main(["--ranks", "7", "gpt2-124m", "--data.dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "--ranks 0 must be greater than 0"),
        (["--rate", "nan"], "--rate nan must be greater than 0"),
        (["--gpu", "h1000"], "--gpu h1000: not in the table"),
        (["--gpu", "cpu", "--run.device", "cuda"], "--gpu cpu contradicts run.device cuda"),
        (["--time", "soon"], "--time soon: expected minutes"),
        (["--rank", "2"], r"unknown flag --rank \(did you mean --ranks\?\)"),
        (["--model.layers", "2"], r"unknown flag --model.layers"),
        (["--probe", "--rate", "5"], "give one of the three"),
        (["--probe-steps", "20"], "--probe-steps has no effect without --probe"),
    ],
)
def test_a_wrong_flag_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        estimate.main([*words, "gpt2-124m"])


def test_the_rate_of_an_earlier_attempt(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": n, "time": 1e9 + n, "tokens": 4000 * n} for n in range(1, 9)]
    run_folder.prepare(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = run(capsys, str(tiny), "--measured", str(tmp_path))
    assert "4,000 tokens/s" in out
    assert f"measured by           {tmp_path}\n" in out


def test_an_attempt_that_has_hardly_begun_is_refused(tiny: Path, tmp_path: Path) -> None:
    run_folder.prepare(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has 0 steady steps"):
        estimate.main([str(tiny), "--measured", str(tmp_path)])


def test_the_memory_of_a_device_can_be_given(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "of 64.00 GB: fits" in run(capsys, str(tiny), "--memory-gb", "64")
    assert "of 0.10 GB: does NOT fit" in run(capsys, str(tiny), "--memory-gb", "0.1")


def test_what_a_probe_measured_goes_before_the_published_table(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = finished_probe(finished_run, tmp_path)
    measure.collect(tmp_path, ending_s=0)
    file = tmp_path / "run.toml"
    file.write_text(sources.to_toml(config))
    out = run(capsys, str(file))
    assert "measured by           probe of " in out
    assert "in all" in out
    assert "measured by           probe of " not in run(capsys, str(file), "--model.n_layer", "1")
    assert not folder.exists()


def test_a_cpu_has_no_time_without_a_rate(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not known: nothing was measured" in run(capsys, str(tiny))


@pytest.mark.processes
def test_help_loads_neither_torch_nor_numpy() -> None:
    done = command("hpcgpt.estimate", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--ranks" in done.stdout
