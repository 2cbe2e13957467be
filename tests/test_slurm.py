"""A run on a real Slurm: two nodes with two ranks each, hit in mid-run, ends with the bytes of one left alone.

The jobs run in the lab (slurm/lab): real slurmctld, slurmd, srun and scontrol, hosts with their own names
and addresses, and GPUs that are not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, clean_env, curve, rows, tensors
from lab_conf import Lab

from hpcgpt import runfolder

STEPS = 1000
LAST = f"checkpoints/step_{STEPS:09d}"
SCRIPT = str(ROOT / "slurm" / "pretrain.sbatch")
SHAPE = ("--nodes=2", "--ntasks-per-node=2")


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """A run that was left alone."""
    job = cluster.sbatch("whole", "--time=10")
    cluster.wait(job)
    return cluster.folder("whole")


@pytest.mark.timeout(600)
def test_an_sbatch_job_that_is_requeued_twice_ends_with_the_same_bytes(cluster: Cluster, whole: Path) -> None:
    job = cluster.sbatch("requeued", "--time=10")
    for hit in (1, 2):
        cluster.wait_for_rows("requeued", hit * STEPS // 3)
        cluster.slurm("scontrol", "requeue", job)
        cluster.wait_for_ends("requeued", hit)
    cluster.wait(job)
    same_result(cluster.folder("requeued"), whole)
    attempts = starts(cluster.folder("requeued"))
    assert [(start["job"], start["world_size"]) for start in attempts] == [(f"{job}_{n}", 4) for n in range(3)]
    one_wandb_run(cluster.folder("requeued"), attempts=3)


@pytest.mark.timeout(600)
def test_a_submitted_job_goes_on_after_its_time_limit(cluster: Cluster, whole: Path) -> None:
    """USR1 30 s before the end of the one minute that Slurm allows; saved, status 75, requeued by ourselves."""
    job = cluster.submit("limited", "--time", "1", "--signal-lead-s", "30")
    folder = cluster.folder("limited")
    cluster.wait_for_ends("limited", 1)
    # Once is enough: a slow machine would need a minute for every few steps.
    cluster.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    cluster.wait(job)
    same_result(folder, whole)
    requeued = [event for event in runfolder.events(folder) if event["event"] == "requeue"]
    assert requeued, "the job was over before its time limit"
    assert all("the time limit is near" in event["reason"] for event in requeued)
    assert len(starts(folder)) == len(requeued) + 1
    one_wandb_run(folder, attempts=len(requeued) + 1)


@pytest.mark.timeout(600)
def test_a_submitted_job_goes_on_after_a_preemption(cluster: Cluster, whole: Path) -> None:
    job = cluster.submit("preempted", "--time", "10")
    cluster.wait_for_rows("preempted", STEPS // 3)
    cluster.slurm("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.wait_for_ends("preempted", 1)
    cluster.wait(job)
    folder = cluster.folder("preempted")
    same_result(folder, whole)
    ends = [event for event in runfolder.events(folder) if event["event"] == "end"]
    assert [end["reason"] for end in ends] == ["told to terminate", "finished"]


def test_a_cancelled_job_is_not_requeued_and_a_mistake_neither(cluster: Cluster) -> None:
    job = cluster.sbatch("cancelled", "--time=10")
    cluster.wait_for_rows("cancelled", 20)
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")
    mistaken = cluster.sbatch("mistaken", "--time=10", arguments=("--train.global_batch", "10"))
    cluster.wait(mistaken, state="FAILED")
    log = next((cluster.folder("mistaken") / "logs").glob(f"{mistaken}_0.log")).read_text()
    assert "train.global_batch 10 is not a multiple of 4 ranks x train.micro_batch 2" in log
    assert "Traceback" not in log
    assert len(starts(cluster.folder("cancelled"))) == 1


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_an_error(cluster: Cluster) -> None:
    """The lab's GPUs are fake, so this is real: no silent training on the CPU."""
    job = cluster.sbatch("blind", "--time=10", arguments=("--run.device", "auto"))
    cluster.wait(job, state="FAILED")
    log = (cluster.folder("blind") / "logs" / f"{job}_0.log").read_text()
    assert "Slurm gave this job GPUs, but torch sees none" in log


class Cluster:
    """The lab, and one folder that all of its nodes see."""

    def __init__(self, lab: Lab, shards: Path, home: Path) -> None:
        self.home, self.env = home, clean_env() | lab.environ() | {"HPCGPT_PYTHON": sys.executable}
        self.env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
        self.config = home / "run.toml"
        self.config.write_text(
            f"""
            [run]
            dir = "{home / "runs"}"
            device = "cpu"
            threads = 1
            [data]
            dir = "{shards}"
            [model]
            n_layer = 2
            n_head = 2
            n_embd = 32
            block_size = 32
            dropout = 0.1
            [schedule]
            warmup_steps = 10
            [train]
            steps = {STEPS}
            global_batch = 16
            micro_batch = 2
            [checkpoint]
            every = 300
            [eval]
            every = 400
            batches = 16
            [sample]
            tokens = 5
            """
        )

    def folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def slurm(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, name: str, *flags: str, arguments: tuple[str, ...] = ()) -> str:
        return self.slurm(
            "sbatch", "--parsable", *SHAPE, *flags, SCRIPT, str(self.config), "--run.name", name, *arguments
        )

    def submit(self, name: str, *flags: str) -> str:
        answer = self.slurm(
            sys.executable, "-m", "hpcgpt.submit", "--json", "--nodes", "2", "--tasks-per-node", "2",
            "--gpus-per-node", "2", *flags, str(self.config), "--run.name", name,
        )  # fmt: skip
        return str(json.loads(answer)["job"])

    def state(self, job: str) -> str:
        shown = self.slurm("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def wait(self, job: str, state: str = "COMPLETED", limit_s: float = 400) -> None:
        deadline = time.monotonic() + limit_s
        while (now := self.state(job)) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            assert time.monotonic() < deadline, f"job {job} is {now} after {limit_s} s"
            time.sleep(0.5)
        assert now == state, self.story(job)

    def wait_for_rows(self, name: str, count: int, limit_s: float = 200) -> None:
        path, deadline = self.folder(name) / "metrics.jsonl", time.monotonic() + limit_s
        while not path.exists() or len(path.read_bytes().splitlines()) < count:
            assert time.monotonic() < deadline, f"{name} made no progress: {self.story('*')}"
            time.sleep(0.1)

    def wait_for_ends(self, name: str, count: int, limit_s: float = 90) -> None:
        """Until `count` attempts have left by themselves."""
        deadline = time.monotonic() + limit_s
        while [event["event"] for event in runfolder.events(self.folder(name))].count("end") < count:
            assert time.monotonic() < deadline, f"{name} did not leave: {self.story('*')}"
            time.sleep(0.1)

    def story(self, job: str) -> str:
        """All that was printed, for a failing test."""
        files = [*self.home.glob(f"slurm-{job}.out"), *self.home.glob(f"runs/*/logs/{job}_*.log"),
                 *self.home.glob(f"runs/*/submit/{job}_*.out")]  # fmt: skip
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)


def same_result(folder: Path, whole: Path) -> None:
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert curve(folder) == curve(whole)
    assert tensors(folder / LAST) == tensors(whole / LAST)


def starts(folder: Path) -> list[dict[str, object]]:
    return [event for event in runfolder.events(folder) if event["event"] == "start"]


def one_wandb_run(folder: Path, attempts: int) -> None:
    """Each attempt left an offline part with the same id, and together they have every step."""
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == attempts
    assert {path.stem for path in parts} == {f"run-{runfolder.run_id(folder)}"}
    steps: set[int] = set()
    for part in parts:
        shown = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(part)],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        # SIGTERM ends wandb's core too, and then its file has no closing record.
        assert not shown.stderr or "incomplete .wandb file" in shown.stderr
        records = [json.loads(line) for line in shown.stdout.splitlines()]
        ids = {record["run"]["run_id"] for record in records if record["type"] == "run"}
        assert ids == {runfolder.run_id(folder)}
        steps |= {record["history"]["item"]["step"] for record in records if record["type"] == "history"}
    assert steps == set(range(1, STEPS + 1))
