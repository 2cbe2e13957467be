"""hpcgpt.doctor.nodes.job: arguments, batch script and report. On a real Slurm: test_doctor_on_slurm.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.doctor.findings import bad
from hpcgpt.doctor.nodes import job
from hpcgpt.doctor.nodes.coordinator import Report
from hpcgpt.doctor.nodes.job import Asked
from hpcgpt.errors import UserError
from tests.fake_slurm import FakeSlurm
from tests.fake_slurm import slurm as slurm


@pytest.mark.parametrize(
    ("typed", "count", "flags", "training"),
    [
        (["--nodes", "3"], 3, {}, []),
        (["--nodes=2", "my.toml", "--run.name", "x"], 2, {}, ["my.toml", "--run.name", "x"]),
        (["--partition=gpu", "-A", "abc", "--nodes", "4", "--gpus-per-node=8", "my.toml"], 4,
         {"partition": "gpu", "account": "abc", "gpus-per-node": "8"}, ["my.toml"]),
        (["--nodes", "2", "--run.dir=/a", "--exclusive", "-Aabc"], 2,
         {"exclusive": "", "account": "abc"}, ["--run.dir=/a"]),
    ],
)  # fmt: skip
def test_flags_of_sbatch_and_of_training_are_distinguished_by_the_point(
    typed: list[str], count: int, flags: dict[str, str], training: list[str]
) -> None:
    assert job.parse(typed) == Asked(count, flags, training)
    assert job.parse([*typed, "--no-wait", "--site", "lumi"]) == Asked(count, flags, training, "lumi", wait=False)


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_wrong_number_of_nodes_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="--nodes"):
        job.parse([f"--nodes={value}"])


def test_the_batch_script_runs_this_python_and_keeps_spaces_in_arguments() -> None:
    text = job.script(Path("/my runs/doctor"), ["my.toml", "--run.name", "a b"])
    assert text.startswith("#!/bin/bash\n")
    assert "-m hpcgpt.doctor.nodes.job '/my runs/doctor' my.toml --run.name 'a b'\n" in text


def test_the_report_shows_a_line_for_each_node_and_the_flag_that_excludes_the_bad_ones() -> None:
    report = Report(["n1", "n2", "n10"])
    report.findings = [bad("clock", "60 s", "1 s", "set it"), bad("pairs", "slow", "9 GB/s", "exclude it")]
    report.findings[0] = type(report.findings[0])(**report.findings[0].as_dict() | {"node": "n10"})  # type: ignore[arg-type]
    report.rates = {
        "matmul": {"n1": [700.0, 650.5], "n2": [700.0, None]},
        "clock_offset_s": {"n1": [0.0], "n10": [60.1]},
    }
    report.pairs = [("n1", "n2", 9.5, 1e-5), ("n1", "n10", None, None)]
    report.elapsed_s = 41.0
    lines = job.as_text(report.as_dict()).splitlines()
    assert lines[:4] == [
        "node  TFLOP/s  pairs GB/s  clock s",
        "n1    650      9.5         +0.000   ok",
        "n2    -        9.5         -        ok",
        "n10   -        0           +60.100  bad",
    ]
    assert lines[-2:] == ["measured in 41 s", "--exclude=n10"]
    assert report.as_dict()["status"] == 1


@pytest.mark.parametrize(("typed", "meant"), [("--partitoin=gpu", "--partition"), ("--data.dri=x", "--data.dir")])
def test_an_unknown_flag_is_refused_with_the_nearest_one(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant):
        job.main(["--nodes", "2", typed], as_json=False)


@pytest.mark.processes
def test_the_report_of_an_earlier_job_with_the_same_id_is_not_taken_for_this_ones(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm.folder / "sbatch").write_text("#!/bin/sh\ncat >/dev/null\necho '7;cluster'\n")
    (slurm.folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    for name in ("7.json", "8.json"):
        (tmp_path / name).write_text("{}")
    assert job.submit(Asked(2, {}, []), tmp_path) == "7"
    assert [path.name for path in tmp_path.glob("*.json")] == ["8.json"]
