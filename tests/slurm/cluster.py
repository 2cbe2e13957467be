"""A user's view of the lab: submit jobs, wait for them, read their files. Shared by the tests on a real Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lab_conf import Lab

from hpcgpt.run import run_folder
from hpcgpt.slurm.scontrol import fields_of
from tests.programs import ROOT, clean_env
from tests.tiny_run import curve, rows, tensors

SCRIPT = str(ROOT / "slurm" / "pretrain.sbatch")
SHAPE = ("--nodes=2", "--ntasks-per-node=2")


class Cluster:
    """The lab, and a folder that all of its nodes see. Every run of it gets `arguments`."""

    def __init__(self, lab: Lab, shards: Path, home: Path, steps: int, arguments: tuple[str, ...] = ()) -> None:
        self.lab, self.steps, self.arguments = lab, steps, arguments
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
            steps = {steps}
            global_batch = 16
            micro_batch = 2
            [checkpoint]
            every = {steps // 2}
            [eval]
            every = {steps * 2 // 3}
            batches = 16
            [sample]
            tokens = 5
            """
        )

    def folder(self, name: str) -> Path:
        return self.home / "runs" / name

    def slurm(self, *command: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env=self.env | (env or {}), cwd=self.home, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def sbatch(self, name: str, *flags: str, arguments: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
        command_line = (*SHAPE, *flags, SCRIPT, str(self.config), "--run.name", name, *self.arguments, *arguments)
        return self.slurm("sbatch", "--parsable", *command_line, env=env)

    def submit(self, name: str, *flags: str, arguments: tuple[str, ...] = ()) -> str:
        answer = self.slurm(
            sys.executable, "-m", "hpcgpt.submit", "--json", "--nodes", "2", "--ntasks-per-node", "2",
            "--gpus-per-node", "2", *flags, str(self.config), "--run.name", name,
            *self.arguments, *arguments,
        )  # fmt: skip
        return str(json.loads(answer)["job"])

    def try_to_submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run hpcgpt.submit with these arguments alone, and return how it ended."""
        command = [sys.executable, "-m", "hpcgpt.submit", *arguments]
        env = self.env | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=self.home, env=env, capture_output=True, text=True, check=False)

    def state(self, job: str) -> str:
        return fields_of(self.slurm("scontrol", "show", "job", job))["JobState"]

    def wait(self, job: str, state: str = "COMPLETED", limit_s: float = 400) -> None:
        deadline = time.monotonic() + limit_s
        while (now := self.state(job)) not in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            assert time.monotonic() < deadline, f"job {job} is {now} after {limit_s} s"
            time.sleep(0.5)
        assert now == state, self.describe(job)

    def has_rows(self, name: str, count: int) -> bool:
        path = self.folder(name) / "metrics.jsonl"
        return path.exists() and len(path.read_bytes().splitlines()) >= count

    def wait_for_rows(self, name: str, count: int, limit_s: float = 200) -> None:
        deadline = time.monotonic() + limit_s
        while not self.has_rows(name, count):
            assert time.monotonic() < deadline, f"{name} made no progress: {self.describe('*')}"
            time.sleep(0.1)

    def wait_for_ends(self, name: str, count: int, limit_s: float = 90) -> None:
        """Wait until `count` attempts have recorded their end."""
        deadline = time.monotonic() + limit_s
        while [event["event"] for event in run_folder.events(self.folder(name))].count("end") < count:
            assert time.monotonic() < deadline, f"{name} did not record its end: {self.describe('*')}"
            time.sleep(0.1)

    def wait_for_starts(self, name: str, count: int, limit_s: float = 200) -> None:
        """Wait until `count` attempts have recorded their start."""
        deadline = time.monotonic() + limit_s
        while len(starts(self.folder(name))) < count:
            assert time.monotonic() < deadline, f"{name} has not started again: {self.describe('*')}"
            time.sleep(0.1)

    def describe(self, job: str) -> str:
        """Return what `job` printed (with "*": every job) and what Slurm reports of it, for a failing test."""
        report = "" if job == "*" else self.slurm("scontrol", "show", "job", job)
        job_id = fields_of(report).get("JobId", job)  # a task of an array has files under its own id
        files = [*self.home.glob(f"slurm-{job_id}.out"), *self.home.glob(f"runs/*/logs/{job_id}_*.log"),
                 *self.home.glob(f"runs/*/submit/{job_id}_*.out")]  # fmt: skip
        return "\n".join([report, *(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in files)])


def assert_same_result(folder: Path, uninterrupted: Path, steps: int) -> None:
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, steps + 1))
    assert curve(folder) == curve(uninterrupted)
    last = f"checkpoints/step_{steps:09d}"
    assert tensors(folder / last) == tensors(uninterrupted / last)


def starts(folder: Path) -> list[dict[str, Any]]:
    return [event for event in run_folder.events(folder) if event["event"] == "start"]


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in run_folder.events(folder) if event["event"] in kinds]


def rank_pids(lab: Lab, job: str) -> dict[int, int]:
    """Return the pid of each rank of a job."""
    ranks = ((int(env["SLURM_PROCID"]), pid, env) for pid, env in running(lab, "hpcgpt.train"))
    return {rank: pid for rank, pid, env in ranks if env.get("SLURM_JOB_ID") == job}


@contextmanager
def paused(lab: Lab, job: str) -> Iterator[None]:
    """Stop the ranks of a job while something else happens: on a slow machine they would end meanwhile."""
    handles = [os.pidfd_open(pid) for pid in rank_pids(lab, job).values()]
    assert handles, f"job {job} has no ranks"
    try:
        for handle in handles:
            signal.pidfd_send_signal(handle, signal.SIGSTOP)
        yield
    finally:
        for handle in handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGCONT)
            os.close(handle)


def warn(cluster: Cluster, job: str) -> None:
    """Send SIGUSR1 to the ranks of a job, which are stopped until it is pending: else they could end first."""
    # The ranks of an array's task have another id; but that one may mean the whole array to scancel.
    own_id = fields_of(cluster.slurm("scontrol", "show", "job", job))["JobId"]
    with paused(cluster.lab, own_id):
        pids = rank_pids(cluster.lab, own_id).values()
        assert pids
        cluster.slurm("scancel", "--signal=USR1", job)
        deadline = time.monotonic() + 60
        while not all(has_pending(pid, signal.SIGUSR1) for pid in pids):
            assert time.monotonic() < deadline, "SIGUSR1 has not arrived"
            time.sleep(0.05)


def has_pending(pid: int, number: int) -> bool:
    """Return whether the process has not yet handled such a signal."""
    waiting = re.search(r"ShdPnd:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return waiting is not None and bool(int(waiting[1], 16) >> (number - 1) & 1)


def running(lab: Lab, module: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the processes ``python -m module`` of this lab's jobs: pid on this machine, and environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command_line = (entry / "cmdline").read_text(errors="replace").split("\0")
            env = dict(pair.partition("=")[::2] for pair in (entry / "environ").read_text(errors="replace").split("\0"))
        except OSError:  # the process has just ended
            continue
        if command_line[1:3] == ["-m", module] and env.get("SLURM_CONF") == str(lab.conf):
            yield int(entry.name), env
