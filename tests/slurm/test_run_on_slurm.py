"""A run on a real Slurm, on two nodes: interrupted, it ends with the bytes of an uninterrupted one.

The jobs run in the lab (slurm/lab): real slurmctld, slurmd, srun and scontrol; hosts with their own names and
addresses; fake GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lab_conf import Lab

from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from tests.programs import on_ranks
from tests.slurm.cluster import Cluster, assert_same_result, events, has_pending, paused, rank_pids, starts

STEPS = 150
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
OFFLINE = ("--tracking.wandb", "offline")


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("cluster"), STEPS, ("--tracking.wandb", "disabled"))


@pytest.fixture(scope="module")
def uninterrupted_run(cluster: Cluster) -> Path:
    """The folder of a run of two ranks that nothing interrupted, on this host."""
    done = on_ranks(2, "hpcgpt.train", str(cluster.config), "--run.name", "uninterrupted", *cluster.arguments)
    assert done.returncode == FINISHED, done.stderr
    return cluster.folder("uninterrupted")


@pytest.mark.timeout(900)
def test_after_a_time_limit_a_requeue_and_a_preemption_there_are_the_same_bytes_and_one_wandb_run(
    cluster: Cluster, uninterrupted_run: Path
) -> None:
    """One submitted job. First USR1 before the end of the one minute that Slurm allows; saved, status 75, requeued by
    the batch script.

    Slurm checks every 30 s, so the signal arrives at any time of the first 30: on a slow machine before the second
    step. Else rank 0 is stopped until it has arrived.
    """
    job = cluster.submit(
        "requeued", "--ntasks-per-node", "1", "--gpus-per-node", "1", "--time", "1", "--signal-lead-s", "30",
        arguments=OFFLINE,
    )  # fmt: skip
    folder = cluster.folder("requeued")
    cluster.wait_for_rows("requeued", 1)
    begun = events(folder, "job")[0]
    hold_until_warned(rank_pids(cluster.lab, job).get(0), begun["started_at"] + 47)
    cluster.wait_for_ends("requeued", 1)
    # One time limit is enough: a slow machine would need a minute for every few steps.
    cluster.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.wait_for_starts("requeued", 2)
    cluster.wait_for_rows("requeued", events(folder, "end")[0]["step"] + 10)
    with paused(cluster.lab, job):  # Slurm continues them
        cluster.slurm("scontrol", "requeue", job)
        cluster.wait_for_ends("requeued", 2)
    cluster.wait_for_starts("requeued", 3)
    cluster.wait_for_rows("requeued", events(folder, "end")[1]["step"] + 10)
    high = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    with paused(cluster.lab, job):
        cluster.slurm("sbatch", *high)
        cluster.wait_for_ends("requeued", 3)
    cluster.wait(job)
    assert_same_result(folder, uninterrupted_run, STEPS)
    attempts = starts(folder)
    assert [(start["job"], start["world_size"]) for start in attempts] == [(f"{job}_{n}", 2) for n in range(4)]
    ends = [event["reason"] for event in events(folder, "end")]
    assert ends == ["the time limit is near", "told to terminate", "told to terminate", "finished"]
    assert "the time limit is near" in events(folder, "requeue")[0]["reason"]
    assert_one_wandb_run(folder)


def hold_until_warned(pid: int | None, until: float) -> None:
    """Stop a process until SIGUSR1 is pending, or until this time, when its own clock says the same.

    Without a pid, or if the process has ended, the signal has arrived already.
    """
    if pid is None:
        return
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        while time.time() < until:
            if has_pending(pid, signal.SIGUSR1):
                break
            time.sleep(0.1)
        os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(600)
def test_cancelled_jobs_and_user_errors_are_not_requeued(cluster: Cluster) -> None:
    job = cluster.sbatch("cancelled", *ONE)
    cluster.wait_for_rows("cancelled", 20)
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")
    mistaken = cluster.sbatch("mistaken", "--time=10", arguments=("--train.global_batch", "10"))
    cluster.wait(mistaken, state="FAILED")
    log = next((cluster.folder("mistaken") / "logs").glob(f"{mistaken}_0.log")).read_text()
    assert "train.global_batch 10 is not a multiple of 4 ranks x train.micro_batch 2" in log
    assert "Traceback" not in log
    assert len(starts(cluster.folder("cancelled"))) == 1


@pytest.mark.timeout(600)
def test_gpus_that_slurm_allocated_and_torch_does_not_see_are_an_error(cluster: Cluster) -> None:
    """The lab's GPUs are fake, so this is a real case: no silent training on the CPU."""
    job = cluster.sbatch("blind", *ONE, arguments=("--run.device", "auto"))
    cluster.wait(job, state="FAILED")
    log = (cluster.folder("blind") / "logs" / f"{job}_0.log").read_text()
    assert "Slurm gave this job GPUs, but torch sees none" in log


def assert_one_wandb_run(folder: Path) -> None:
    """Check that attempts left offline parts with the same id, and that together they have every step."""
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    # On busy cores an attempt may end before wandb has begun: the next one sends its steps, and on a slow machine one
    # part has them all. There may also be more than one of an attempt, where a signal ended wandb's core process, which
    # is then started again. That several attempts are one run at any speed: tests/tracking/test_tracker.py.
    assert {path.stem for path in parts} == {f"run-{run_folder.run_id(folder)}"}
    steps: set[int] = set()
    for part in parts:
        shown = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(part)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        # SIGTERM ends wandb's core process too, and then its file has no closing record.
        assert not shown.stderr or "incomplete .wandb file" in shown.stderr
        records = [json.loads(line) for line in shown.stdout.splitlines()]
        # A part has no record at all if the attempt was ended before wandb wrote the first one.
        ids = {record["run"]["run_id"] for record in records if record["type"] == "run"}
        assert ids == ({run_folder.run_id(folder)} if records else set())
        rows = [record["history"]["item"] for record in records if record["type"] == "history"]
        steps |= {row["step"] for row in rows if "train/loss" in row}  # events have rows of their own
    assert steps == set(range(1, STEPS + 1))
