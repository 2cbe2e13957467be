"""hpcgpt/estimate/memory.py: a process with torch answers; without it the answer is counted, and says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hpcgpt.config.options import Config, Model, Parallel, Train
from hpcgpt.estimate.analytic import measure
from hpcgpt.estimate.memory import Estimator
from hpcgpt.estimate.request import Request, from_json, to_json

CONFIG = Config(model=Model(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=512), train=Train(micro_batch=2))
REQUEST = Request(CONFIG, ranks=2, on_cpu=True, micro_steps=1, saves_while_training=True)


def test_a_request_survives_its_journey_as_text() -> None:
    assert from_json(to_json(REQUEST)) == REQUEST


@pytest.mark.processes
def test_a_process_answers_and_answers_again() -> None:
    with Estimator() as estimator:
        first = estimator.ask(REQUEST)
        assert first.method == "fake tensors", first.remarks
        assert first.peak.parts["framework"] > 50e6
        assert estimator.ask(REQUEST) is first
        fsdp = dataclasses.replace(CONFIG, parallel=Parallel(mode="fsdp"))
        sharded = estimator.ask(dataclasses.replace(REQUEST, config=fsdp))
        # FSDP loads torch's compiler, of 75 MB.
        assert sharded.peak.parts["framework"] > first.peak.parts["framework"] + 30e6
        assert estimator.problem == ""


@pytest.mark.processes
def test_a_slow_torch_is_not_waited_for() -> None:
    with Estimator(longest_s=0.01) as estimator:
        found = estimator.ask(REQUEST)
    assert found.method == "analytic"
    assert found.remarks == ("counted roughly: PyTorch took more than 0.01 s",)


@pytest.mark.processes
def test_a_missing_torch_gives_a_plain_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Estimator() as estimator:
        found = estimator.ask(REQUEST)
        assert "libcudart.so.12: cannot open" in found.remarks[0]
        assert estimator.ask(Request(CONFIG, 4, True, 1, False)).method == "analytic"  # without another try


@pytest.mark.processes
def test_a_python_that_does_not_exist_gives_a_plain_sentence() -> None:
    with Estimator(python="/nonexistent/python") as estimator:
        assert "/nonexistent/python does not run" in estimator.ask(REQUEST).remarks[0]


def program(folder: Path, text: str) -> str:
    """Make a program in the place of Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.processes
def test_an_answer_that_is_none_gives_a_plain_sentence(tmp_path: Path) -> None:
    with Estimator(python=program(tmp_path, "echo Welcome to the cluster; cat > /dev/null")) as estimator:
        found = estimator.ask(REQUEST)
    assert found.remarks == ("counted roughly: PyTorch cannot be asked: it answered 'Welcome to the cluster'",)


@pytest.mark.processes
def test_a_process_that_ends_between_two_questions_gives_a_plain_sentence(tmp_path: Path) -> None:
    """As the kernel ends one when memory runs out."""
    answer = json.dumps(dataclasses.asdict(measure(REQUEST, "")))
    (tmp_path / "answer").write_text(answer + "\n")
    with Estimator(python=program(tmp_path, f"read line; cat {tmp_path}/answer; echo killed >&2")) as estimator:
        assert estimator.ask(REQUEST).peak.total > 0
        assert estimator._process is not None
        estimator._process.wait()
        found = estimator.ask(Request(CONFIG, 4, True, 1, False))
    assert found.remarks == ("counted roughly: PyTorch cannot be asked: killed",)
