"""hpcgpt.doctor.site: what a Slurm does, from what it shows. On a real one: nodes/test_doctor_on_slurm.py."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from hpcgpt.distributed.stop_signals import RECENT, RECENT_SAVES
from hpcgpt.doctor import site
from hpcgpt.doctor.findings import Finding
from hpcgpt.sites.qos import Qos

CONFIG = """\
Configuration data as of 2026-11-28T18:00:00
AuthInfo                = socket=/run/munge.socket,cred_expire=5
JobRequeue              = 1
KillWait                = 30 sec
MaxArraySize            = 1001
OverTimeLimit           = 0 min
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PropagateResourceLimits = ALL
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at ctl is UP
"""
PARTITION = (
    "PartitionName=gpu AllowGroups=ALL DefaultTime=01:00:00 GraceTime=25 MaxTime=1-00:00:00 "
    "PreemptMode=REQUEUE State=UP TotalNodes=4 SelectTypeParameters=NONE\n"
)


def shown(text: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in site.judge_config(site.parse_config(text))}


def test_the_configuration_is_read_with_its_consequences() -> None:
    found = shown(CONFIG)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert found["version"].found == "Slurm 22.05.8"
    assert found["requeue delay"].found.startswith("a requeued job waits for 5 s at least")
    assert found["KillWait"].found.startswith("30 sec")
    assert found["MaxArraySize"].found.startswith("1001")
    assert "the batch script requeues it" in found["leaving in the grace time"].found
    assert "limits" in found


@pytest.mark.parametrize(
    ("before", "after", "check", "words"),
    [
        ("22.05.8", "24.05.1", "leaving in the grace time", "is requeued by Slurm"),
        ("22.05.8", "23.11.10", "leaving in the grace time", "counts as finished"),
        (",cred_expire=5", "", "requeue delay", "waits for 120 s"),
        ("JobRequeue              = 1", "JobRequeue              = 0", "JobRequeue", "not requeued"),
        ("preempt/partition_prio", "preempt/none", "preemption", "none"),
    ],
)
def test_another_configuration_has_other_consequences(before: str, after: str, check: str, words: str) -> None:
    assert words in shown(CONFIG.replace(before, after))[check].found


def test_what_slurm_does_not_show_is_a_question_mark() -> None:
    assert shown("")["KillWait"].found.startswith("?")
    assert site.version_of({}) == (0, 0)


@pytest.mark.parametrize(
    ("before", "after", "level", "words"),
    [
        ("", "", "ok", "4 nodes, UP, time 01:00:00 by default, at most 1-00:00:00; preemption REQUEUE, grace 25 s"),
        ("State=UP", "State=DOWN", "warning", "DOWN"),
        ("PreemptMode=REQUEUE", "PreemptMode=CANCEL", "warning", "CANCEL"),
        ("GraceTime=25", "GraceTime=0", "ok", "killed after KillWait (30 sec)"),
    ],
)
def test_partitions_are_judged(before: str, after: str, level: str, words: str) -> None:
    partitions = site.parse_partitions(PARTITION.replace(before, after) if before else PARTITION)
    (found,) = site.judge_partitions(partitions, site.parse_config(CONFIG))
    assert (found.check, found.level, words in found.found) == ("partition gpu", level, True)


def test_what_a_node_may_call_is_read_from_the_jobs_output() -> None:
    can_ask, can_submit = f"{site.CAN}scontrol\n", f"{site.CAN}sbatch\n"
    good = site.judge_try(f"{can_ask}sbatch: Job 1 to start at ...\n{can_submit}{site.END}\n")
    assert [finding.level for finding in good] == ["ok", "ok"]
    refused = site.judge_try(f"{can_ask}sbatch: lua: a message\nsbatch: error: you can only ask\n{site.END}\n")
    assert [finding.level for finding in refused] == ["ok", "warning"]
    assert refused[1].found == "sbatch: error: you can only ask"


def test_the_limits_of_a_qos_are_shown_and_without_accounting_that_is_said() -> None:
    long = Qos(
        5760,
        frozenset(["PartitionTimeLimit"]),
        per_job={"node": 3},
        per_account={"node": 8, "gres/gpu": 32},
        jobs=2,
        submitted=10,
    )
    (found,) = site.judge_qos({"long": long})
    assert (found.check, found.found) == (
        "QOS long",
        "time at most 4-00:00:00, whatever the partition has; a job at most node=3; an account at most node=8, "
        "gres/gpu=32; 2 jobs of a user at one time; 10 with those that wait: more with --after or an array are "
        "refused; grace 0 s, preemption as the cluster",
    )
    assert [finding.found for finding in site.judge_qos({})] == [
        "not readable here: there is no accounting, or users may not ask"
    ]


def test_a_mode_of_preemption_has_no_effect_where_nothing_preempts() -> None:
    partitions = site.parse_partitions(PARTITION.replace("=REQUEUE", "=CANCEL"))
    config = site.parse_config(CONFIG.replace("preempt/partition_prio", "preempt/none"))
    assert [finding.level for finding in site.judge_partitions(partitions, config)] == ["ok"]


def make_run(folder: Path, step_s: float, save_s: float) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text('{"id": "abcdefghij", "created": 1.0}\n')
    save = {"event": "save", "time": 3.0, "attempt": 1, "step": 2, "seconds": save_s, "stall_s": 0.1, "bytes": 1}
    (folder / "events.jsonl").write_text(json.dumps(save) + "\n")
    row = {"step": 1, "time": 2.0, "attempt": 1, "tokens": 1, "train/loss": 1.0, "train/step_s": step_s}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize(("step_s", "save_s", "lead_s"), [(0.5, 2.0, 120), (40.0, 100.0, 260), (200.0, 30.0, 320)])
def test_the_lead_time_is_a_step_two_saves_and_some_slack(
    tmp_path: Path, step_s: float, save_s: float, lead_s: int
) -> None:
    found = site.lead(make_run(tmp_path / "run", step_s, save_s))
    assert (found.level, found.found.endswith(f"--signal=USR1@{lead_s}")) == ("ok", True), found


def test_only_the_most_recent_steps_and_saves_count_as_in_a_run_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 500.0, 900.0)
    row = json.loads((run / "metrics.jsonl").read_text())
    save = json.loads((run / "events.jsonl").read_text())
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(
            json.dumps(row | {"step": step, "train/step_s": 40.0}) + "\n" for step in range(2, 2 + RECENT - 1)
        )
    with open(run / "events.jsonl", "a") as file:
        file.writelines(
            json.dumps(save | {"step": step, "seconds": 100.0}) + "\n" for step in range(2, 2 + RECENT_SAVES - 1)
        )
    assert site.advised_lead_s(run) == 2440  # the slow ones are among them
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row | {"step": 2 + RECENT, "train/step_s": 40.0}) + "\n")
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(save | {"step": 2 + RECENT, "seconds": 100.0}) + "\n")
    assert site.advised_lead_s(run) == 260
    assert site.lead(run).found.startswith("the longest of the last 20 steps took 40.0 s, of the last 5 saves 100.0 s")


def test_the_rows_of_a_long_run_are_not_all_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 40.0, 100.0)
    last = (run / "metrics.jsonl").read_bytes()
    with open(run / "metrics.jsonl", "wb") as file:
        file.seek(200 << 20)
        file.write(b"\n" + last)
    tracemalloc.start()
    try:
        assert site.advised_lead_s(run) == 260
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_run_that_has_not_saved_yet_gives_no_lead_time(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1.0, 1.0)
    (run / "events.jsonl").write_text("")
    assert site.lead(run).level == "warning"
