"""Ways to start ranks and to continue, on a real Slurm: mpirun in a job, a hidden launcher, checkpoint.step, a grid.

The jobs of this file run beside each other.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab_conf import Lab

from tests.distributed.test_launchers import MPIS
from tests.programs import ROOT
from tests.slurm.cluster import SCRIPT, Cluster, events, starts

STEPS = 12
QUICK = ("--sample.tokens", "0", "--eval.every", "0", "--tracking.wandb", "disabled")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
TWO = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=2", "--time=10")


@dataclass(frozen=True)
class Jobs:
    """The jobs, all submitted: one that goes back to step 4, one whose ranks see no launcher, one for each MPI."""

    cluster: Cluster
    back: str
    hidden: str
    mpi: dict[str, str]


@pytest.fixture(scope="module")
def jobs(
    lab: Lab, shards_folder: Path, config: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Jobs:
    cluster = Cluster(lab, shards_folder, tmp_path_factory.mktemp("launchers"), STEPS, QUICK)
    shutil.copytree(finished_run, cluster.folder("back"))
    longer = ("--checkpoint.step", "4", "--train.steps", "100000", "--checkpoint.every", "20", *QUICK)
    back = cluster.slurm(
        "sbatch", "--parsable", *ONE, SCRIPT, str(config), "--run.dir", str(cluster.home / "runs"), "--run.name",
        "back", *longer,
    )  # fmt: skip
    python = cluster.home / "contained"
    python.write_text(f'#!/bin/bash\nunset "${{!SLURM_@}}"\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    endless = ("--run.name", "hidden", "--train.steps", "1000000", *QUICK)
    hidden = cluster.slurm(
        "sbatch", "--parsable", *TWO, SCRIPT, str(cluster.config), *endless, env={"HPCGPT_RANKS_PYTHON": str(python)}
    )
    mpi = {package: mpirun(cluster, package) for package in MPIS if shutil.which(MPIS[package][0])}
    return Jobs(cluster, back, hidden, mpi)


def mpirun(cluster: Cluster, package: str) -> str:
    """Submit a job of two nodes that starts a rank on each with this package's mpirun."""
    ranks = {"openmpi-bin": ["-n", "2", "--map-by", "node"], "mpich": ["-n", "2", "-ppn", "1"]}[package]
    train = [sys.executable, "-m", "hpcgpt.train", str(cluster.config), "--run.name", package, *QUICK]
    flags = ("--nodes=2", "--ntasks-per-node=1", "--time=10", f"--output={cluster.home}/slurm-%j.out")
    command = shlex.join([*MPIS[package], *ranks, *train])
    return cluster.slurm("sbatch", "--parsable", *flags, "--wrap", f"exec {command}", env={"PYTHONPATH": str(ROOT)})


def wait_for(what: Callable[[], bool], described: Callable[[], str], limit_s: float = 200) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, described()
        time.sleep(0.1)


@pytest.mark.timeout(300)
def test_a_job_with_checkpoint_step_goes_back_once_and_after_a_requeue_continues_from_the_newest(jobs: Jobs) -> None:
    cluster, folder = jobs.cluster, jobs.cluster.folder("back")

    def newest_save() -> int:
        return max((event["step"] for event in events(folder, "save") if event["attempt"] == 2), default=0)

    wait_for(lambda: newest_save() > 4, lambda: cluster.describe(jobs.back))
    cluster.slurm("scontrol", "requeue", jobs.back)
    wait_for(lambda: len(starts(folder)) == 3, lambda: cluster.describe(jobs.back))
    log, advice = (
        folder / "logs" / f"{jobs.back}_1.log",
        f"to go back once more: hpcgpt checkpoint back {folder} --step 4",
    )
    wait_for(lambda: advice in log.read_text(), lambda: cluster.describe(jobs.back))
    _, first, second = starts(folder)
    cluster.slurm("scancel", jobs.back)
    assert (first["job"], first["step"]) == (f"{jobs.back}_0", 4)
    assert (second["job"], second["step"]) == (f"{jobs.back}_1", newest_save())
    assert [event["step"] for event in events(folder, "went_back")] == [4]
    aside = folder / "checkpoints" / "newer_than_000000004.g0002"
    assert sorted(path.name for path in aside.glob("step_*")) == ["step_000000008", "step_000000012"]


@pytest.mark.timeout(300)
def test_two_tasks_that_do_not_see_that_srun_started_them_end_with_a_sentence(jobs: Jobs) -> None:
    """As in a container that hides Slurm's variables: each would train alone, in the same folder."""
    cluster = jobs.cluster
    cluster.wait(jobs.hidden, state="FAILED")
    log = next((cluster.folder("hidden") / "logs").glob(f"{jobs.hidden}_0.log")).read_text()
    assert "This process is rank 0 of 1: it has found no variables of srun, torchrun or mpirun" in log
    assert "hand the variables of the launcher on into a container" in log
    assert "Traceback" not in log
    assert [start["world_size"] for start in starts(cluster.folder("hidden"))] in ([], [1])
    assert events(cluster.folder("hidden"), "requeue", "chain") == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("package", MPIS)
def test_mpirun_in_a_job_starts_the_ranks_of_one_run_on_its_nodes(jobs: Jobs, package: str) -> None:
    if package not in jobs.mpi:
        pytest.skip(f"there is no {MPIS[package][0]}: apt install {package}")
    jobs.cluster.wait(jobs.mpi[package])
    (start,) = starts(jobs.cluster.folder(package))
    assert (start["world_size"], len(set(start["hosts"]))) == (2, 2)
    assert start["job"] == f"{jobs.mpi[package]}_0"
    (end,) = events(jobs.cluster.folder(package), "end")
    assert (end["reason"], end["step"]) == ("finished", STEPS)


def test_status_shows_each_task_of_a_grid_that_waits(jobs: Jobs) -> None:
    cluster = jobs.cluster
    env = cluster.env | {"PYTHONPATH": str(ROOT)}

    def hpcgpt(*arguments: str) -> str:
        done = subprocess.run([sys.executable, "-m", *arguments], cwd=cluster.home, text=True, env=env,
                              capture_output=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    submitted = json.loads(
        hpcgpt(
            "hpcgpt.submit", "--json", "--live", "--begin=now+2hours", "--at-once=1", "--grid", "run.seed=1,2,3",
            *ONE, str(cluster.config), "--run.name", "grid", *QUICK,
        )
    )  # fmt: skip
    job = submitted["job"]
    names = [f"grid-seed{seed}" for seed in (1, 2, 3)]
    wait_for(
        lambda: "BeginTime" in cluster.slurm("squeue", "--noheader", f"--jobs={job}", "--format=%r"),
        lambda: cluster.describe(job),
    )
    lines = hpcgpt("hpcgpt.status", "--json", *(str(cluster.folder(name)) for name in names)).splitlines()
    shown = {Path(run["run"]).name: run for run in map(json.loads, lines)}
    assert [shown[name]["state"] for name in names] == ["pending"] * 3
    assert [shown[name]["job"]["id"] for name in names] == [f"{job}_{task}" for task in range(3)]
    assert {run["job"]["reason"] for run in shown.values()} == {"BeginTime"}
    assert all(run["job"]["starts_at"] > time.time() + 3600 for run in shown.values())
    cluster.slurm("scancel", f"{job}_1")
    table = hpcgpt("hpcgpt.status", *(str(cluster.folder(name)) for name in names))
    cells = dict(line.split()[:2] for line in table.splitlines()[:4])
    assert [cells[name] for name in names] == ["pending", "new", "pending"]
    assert f"grid-seed3: job {job}_2 (BeginTime): it may not start before" in " ".join(table.split())
    cluster.slurm("scancel", job)
