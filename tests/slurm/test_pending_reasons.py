"""hpcgpt.slurm.pending_reasons: each reason that Slurm has is explained, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.slurm.pending_reasons import explain, is_held

REASONS = [
    line for line in (Path(__file__).parent / "job_reasons.txt").read_text().splitlines() if not line.startswith("#")
]


def test_every_reason_of_slurm_is_explained_with_an_action() -> None:
    assert len(REASONS) > 190
    for reason in REASONS:
        found = explain(reason, "7")
        assert found
        assert "only this Slurm" not in found.meaning, reason
        assert found.action, reason
        assert "{job}" not in found.action
        assert "JOB" not in found.action


@pytest.mark.parametrize("reason", ["None", "(null)", "", "N/A", " None "])
def test_a_job_that_slurm_has_not_looked_at_has_no_reason(reason: str) -> None:
    assert explain(reason) is None


@pytest.mark.parametrize(
    ("reason", "meaning", "action", "waiting_helps"),
    [
        ("Priority", "jobs with a higher priority are ahead of it", "`sprio -j 7`", True),
        ("Resources", "it is next", "nothing to do but wait", True),
        ("JobHeldUser", "holds it", "scontrol release 7", False),
        ("JobHeldAdmin", "an administrator holds it", "support", False),
        ("PartitionTimeLimit", "its --time is longer than the partition allows", "TimeLimit=HH:MM:SS", False),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "down, drained or reserved", "scontrol show reservation", True),
        ("DependencyNeverSatisfied", "did not end as its --dependency requires", "scancel 7", False),
        ("BeginTime", "may not start before a certain time", "wait", True),
        # The limit of a user has room again when other jobs end; one of each job this job exceeds by itself.
        ("QOSMaxGRESPerUser", "all jobs of this user together have reached the limit of the QOS on GPUs", "wait", True),
        ("QOSMaxGRESPerJob", "it is above the limit of the QOS on GPUs per job", "fewer GPUs, or another --qos", False),
        ("QOSMaxGRESPerNode", "on GPUs per node", "fewer GPUs", False),
        ("QOSMaxCpuPerUserLimit", "all jobs of this user together", "wait", True),
        ("QOSMaxWallDurationPerJobLimit", "limit of the QOS on time per job", "a shorter --time", False),
        ("AssocMaxNodePerJobLimit", "limit of the account on nodes per job", "fewer --nodes, or another --acc", False),
        ("QOSMaxJobsPerUserLimit", "limit of the QOS on jobs", "wait", True),
        ("AssocGrpGRES", "all jobs of the account together have reached its limit on GPUs", "wait", True),
        ("AssocGrpGRESMinutes", "the account has used up its budget of GPU minutes", "sshare", True),
        ("AssocGrpCPURunMinutesLimit", "counting what running jobs may still use", "wait", True),
        ("QOSGrpNodeLimit", "all jobs of the QOS together have reached its limit on nodes", "wait", True),
        ("MaxGRESPerAccount", "all jobs of the account together have reached the limit of the QOS", "wait", True),
        ("QOSMinGRES", "it asks for less than the QOS requires: GPUs", "more", False),
        # Sentences, as squeue prints them: with underscores.
        ("launch_failed_requeued_held", "could not be launched", "scontrol release 7", False),
        ("Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions",
         "nodes that it could use are down", "sinfo -R", True),
        ("SomethingNew", "a reason that only this Slurm has", "support", True),
    ],
)  # fmt: skip
def test_what_a_reason_means_and_what_to_do(reason: str, meaning: str, action: str, waiting_helps: bool) -> None:
    found = explain(reason, "7")
    assert found
    assert meaning in found.meaning
    assert action in found.action
    assert found.waiting_helps is waiting_helps


def test_held_jobs_are_recognized() -> None:
    held = [("PENDING", "JobHeldUser"), ("PENDING", "JobHeldAdmin"), ("REQUEUE_HOLD", "None"), ("SPECIAL_EXIT", ""),
            ("PENDING", "JobHoldMaxRequeue"), ("PENDING", "launch_failed_requeued_held")]  # fmt: skip
    assert all(is_held(*pair) for pair in held)
    assert not any(is_held("PENDING", reason) for reason in ("Priority", "BeginTime", "None", "Dependency"))
