"""hpcgpt/estimate/probe/in_job.py: the flags of the probe's job, and the wait for it. On a real Slurm:
tests/slurm/test_probe_on_slurm.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcgpt import exit_codes
from hpcgpt.config.options import Config, Run
from hpcgpt.errors import UserError
from hpcgpt.estimate.probe import in_job, measure
from hpcgpt.estimate.probe.measure import Prepared
from hpcgpt.run import run_folder
from hpcgpt.run.run_folder import Exit
from hpcgpt.slurm.scontrol import Job


@pytest.fixture
def probe(tmp_path: Path) -> Prepared:
    return measure.prepare(Config(run=Run(dir=str(tmp_path), name="gpt2")))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_job, "_POLL_S", 0.001)
    monkeypatch.setattr(in_job, "_ASK_SLURM_S", 0.0)


def end(probe: Prepared, status: int, reason: str = "finished") -> None:
    run_folder.write_exit(probe.folder, Exit("12_0", status, reason, 30, saved=True))


def test_the_requests_are_the_same_but_the_time() -> None:
    flags = {"nodes": "2", "gpus-per-node": "a100:4", "partition": "gpu", "time": "24:00:00", "hold": "",
             "dependency": "afterany:7", "job-name": "mine", "output": "mine.log", "mem": "0"}  # fmt: skip
    assert in_job.flags_for(flags) == {
        "nodes": "2", "gpus-per-node": "a100:4", "partition": "gpu", "time": "20", "mem": "0",
    }  # fmt: skip


@pytest.mark.parametrize(("limit", "probes"), [("5", "5"), ("0:30:00", "20"), ("0", "20"), ("20", "20")])
def test_a_job_of_minutes_keeps_its_limit(limit: str, probes: str) -> None:
    assert in_job.flags_for({"time": limit})["time"] == probes


def test_the_warning_of_a_longer_job_is_not_that_of_the_probe() -> None:
    assert "signal" not in in_job.flags_for({"time": "45", "signal": "USR1@1350"})
    assert in_job.flags_for({"time": "15", "signal": "USR1@300"})["signal"] == "USR1@300"


def test_a_requeued_probe_is_waited_for_until_its_job_has_ended(probe: Prepared) -> None:
    said: list[str] = []

    def states() -> Iterator[str]:
        yield from ("PENDING", "PENDING", "RUNNING")
        end(probe, exit_codes.AGAIN, "the time limit")
        yield from ("COMPLETING", "PENDING", "RUNNING")
        end(probe, exit_codes.FINISHED)
        yield from ("RUNNING", "COMPLETING", "COMPLETED")

    answers = states()
    in_job.wait(probe, "12", said.append, lambda _: Job(next(answers)))
    assert next(answers, "") == ""
    assert said[0] == "the probe's job 12: pending"
    assert len(said) == 7  # none twice in a row


def test_no_answer_of_slurm_is_no_end_of_the_job(probe: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_job, "_ASK_SLURM_S", 0.0)
    said: list[str] = []

    def answers() -> Iterator[Job]:
        yield from (Job("RUNNING"), Job("", answered=False), Job("RUNNING"))
        end(probe, exit_codes.FINISHED)
        yield Job("COMPLETED")

    left = answers()
    in_job.wait(probe, "12", said.append, lambda _: next(left))
    assert said[1] == "the probe's job 12: no answer of slurm"


@pytest.mark.timeout(60)  # it would wait for ever
@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "REVOKED"])
def test_a_probe_that_fails_is_named_with_its_log(probe: Prepared, state: str) -> None:
    log = probe.folder / "logs" / "12_0.log"
    log.write_text("error: no GPU\n")
    end(probe, exit_codes.FAILED, "no GPU")
    with pytest.raises(UserError, match=rf"the probe failed, job 12 {state.lower()}: no GPU; see {log}"):
        in_job.wait(probe, "12", lambda _: None, lambda _: Job(state))


def test_a_finished_probe_whose_job_slurm_has_forgotten_counts(probe: Prepared) -> None:
    end(probe, exit_codes.FINISHED)
    in_job.wait(probe, "12", lambda _: None, lambda _: Job(""))
