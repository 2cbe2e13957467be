"""hpcgpt/estimate/probe/here.py: a real probe on this machine, and what a failing one says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.estimate import __main__ as estimate
from hpcgpt.estimate import analytic, memory
from hpcgpt.estimate.probe import here, measure
from hpcgpt.slurm import partitions


@pytest.mark.processes
def test_a_probe_is_measured_kept_and_used_by_later_estimates(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Memory is counted without torch, whose start is tests/estimate/test_memory.py's matter.
    monkeypatch.setattr(memory.Estimator, "ask", lambda _, request: analytic.measure(request, "counted"))
    words = [str(tiny), "--ranks", "2", "--train.steps", "1000", "--json"]
    assert estimate.main([*words, "--probe", "--probe-steps", "15"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_per_s"]["measured"]
    assert "steady steps, 2 x " in found["tokens_per_s"]["sources"][0]
    spent = found["time"]
    assert spent["evaluations"] == 167
    assert spent["evaluation_s"] == pytest.approx(167 * spent["habits"]["eval_s"])
    assert spent["total_s"] > spent["seconds"] + spent["evaluation_s"] > 0
    assert [words for words in spent["habits"]["assumed"] if "failure" not in words] == []
    (line,) = (tmp_path / "runs" / "probes.jsonl").read_text().splitlines()
    assert json.loads(line)["ranks"] == 2
    assert not (tmp_path / "runs" / ".probe" / "tiny").exists()
    assert not (tmp_path / "runs" / "tiny").exists()  # the run itself has not been touched
    assert estimate.main(words) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_s"] == found["tokens_per_s"]


@pytest.mark.processes
def test_a_rank_that_fails_ends_the_probe_with_its_words(tiny: Path) -> None:
    prepared = measure.prepare(sources.from_file(tiny))
    prepared.file.write_text("not = a configuration")
    with pytest.raises(UserError, match=r"(?s)the probe failed: rank 0 ended with status 2.*probe\.toml"):
        here.run(prepared, 1)


def test_a_login_node_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "ask", lambda: (["a partition"], ""))
    with pytest.raises(UserError, match="hpcgpt submit --dry-run --probe measures in a job"):
        here.refuse_on_login_node({})
    here.refuse_on_login_node({"SLURM_JOB_ID": "7"})  # an allocation


def test_without_a_slurm_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "ask", lambda: ([], "no sinfo"))
    here.refuse_on_login_node(dict(os.environ))
