"""How a job may be divided into tasks and GPUs, on a real Slurm: which ranks there are, and which GPU each one has.

Jobs that fit run tests/slurm/show_layout.py in place of training, under the real batch script. Those that do not fit
run the real training, which ends with a sentence before torch is loaded.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from lab_conf import Lab

from hpcgpt.exit_codes import USER_MISTAKE
from tests.programs import ROOT
from tests.slurm.cluster import SCRIPT, Cluster

# By name: the command, its flags, and for each rank its node (0: the one with the most ranks), local rank of how many
# there, and GPU. The batch script asks for 2 nodes with 2 tasks and 2 GPUs each.
FITTING = {
    "as it is": ("sbatch", "", ["0 0/2 0", "0 1/2 1", "1 0/2 0", "1 1/2 1"]),
    "gpus-per-node": ("sbatch", "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1", ["0 0/1 0"]),
    "gpus-per-task": ("sbatch", "--nodes=1 --gpus-per-task=1", ["0 0/2 0", "0 1/2 1"]),
    "gres": ("sbatch", "--nodes=2 --ntasks-per-node=1 --gres=gpu:1", ["0 0/1 0", "1 0/1 0"]),
    "no GPUs": ("sbatch", "--nodes=1 --gpus-per-node=0", ["0 0/2 None", "0 1/2 None"]),
    "an array's task": ("sbatch", "--nodes=1 --array=3", ["0 0/2 0", "0 1/2 1"]),
    "salloc": ("salloc", "--nodes=1 --ntasks=2 --gpus-per-node=2 bash SCRIPT", ["0 0/2 0", "0 1/2 1"]),
    "one of salloc": ("salloc", "--ntasks=2 --gpus-per-node=2 srun --ntasks=1 --gpus-per-node=1 SHOW", ["0 0/1 0"]),
    "srun": ("srun", "--nodes=2 --ntasks-per-node=2 --gres=gpu:2 SHOW", ["0 0/2 0", "0 1/2 1", "1 0/2 0", "1 1/2 1"]),
    "uneven": ("srun", "--nodes=2 --ntasks=3 --gpus-per-task=1 SHOW", ["0 0/2 0", "0 1/2 1", "1 0/1 0"]),
    "bound": ("srun", "--nodes=1 --ntasks=2 --gpus=2 --ntasks-per-gpu=1 SHOW", ["0 0/2 0", "0 1/2 1"]),
    "visible": ("srun", "--ntasks=1 --gpus=1 --export=ALL,CUDA_VISIBLE_DEVICES=1 SHOW", ["0 0/1 0"]),
}  # fmt: skip
WRONG = {
    "too many tasks": ("sbatch", "--nodes=1 --ntasks-per-node=4", "4 ranks, and Slurm gave this step 2 GPUs there:"),
    "one of two GPUs": ("sbatch", "--nodes=1 --ntasks-per-node=1", "1 rank, and Slurm gave this step 2 GPUs there"),
    "too small a gres": ("sbatch", "--nodes=1 --gres=gpu:1", "2 ranks, and Slurm gave this step 1 GPU there: each"),
    "uneven": ("sbatch", "--nodes=2 --ntasks=3", "has 1 rank, and Slurm gave this step 2 GPUs there: 1 would be idle"),
    "GPUs of a task": ("sbatch", "--nodes=1 --ntasks-per-node=1 --gpus-per-task=2", "1 would be idle"),
    "two ideas of the rank": ("sbatch", "--nodes=1 --export=ALL,RANK=0,WORLD_SIZE=1", "but SLURM_STEP_NUM_TASKS is 2"),
    "no GPUs, device cuda": ("srun", "--ntasks=1 TRAIN --run.device cuda", "run.device is cuda, but torch sees none"),
    "no srun": ("sbatch", "--nodes=2 --ntasks=4 --wrap TRAIN", "4 tasks on 2 nodes, and this process would train"),
    "no srun in salloc": ("salloc", "--ntasks=2 TRAIN", "has 2 tasks on 1 node, and this process would train alone"),
    "outside of the nodes": ("salloc", "--ntasks=1 --gpus-per-node=1 TRAIN", "has GPUs, and this process is on "),
}  # fmt: skip


pytestmark = pytest.mark.timeout(600)  # the first test waits for the lab, and for all of the jobs


class Jobs:
    """The jobs of both tables, which all run at the same time."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.show = cluster.home / "show"
        self.show.write_text(f"#!/bin/bash\nexec {sys.executable} {ROOT}/tests/slurm/show_layout.py\n")
        self.show.chmod(0o755)
        self.running = {f"fits-{name}": self._start(f"fits-{name}", *FITTING[name][:2]) for name in FITTING}
        self.running |= {f"wrong-{name}": self._start(f"wrong-{name}", *WRONG[name][:2]) for name in WRONG}

    def _start(self, run: str, tool: str, words: str) -> subprocess.Popen[str]:
        env = self.cluster.env | {"PYTHONPATH": str(ROOT)}
        if run.startswith("fits"):
            env["HPCGPT_RANKS_PYTHON"] = str(self.show)
        arguments = [
            str(self.cluster.config),
            "--run.name",
            run,
            "--run.device",
            "auto",
            "--tracking.wandb",
            "disabled",
        ]
        train = [sys.executable, "-m", "hpcgpt.train", *arguments]
        command = [tool]
        if tool == "sbatch":
            command += ["--wait", f"--output={self.cluster.home}/{run}.out"]
            words = words if "--wrap" in words else f"{words} SCRIPT"
        for word in words.split():
            if word == "TRAIN":
                command += [shlex.join(train)] if command[-1] == "--wrap" else train
            else:
                command += {"SHOW": [str(self.show)], "SCRIPT": [SCRIPT, *arguments]}.get(word, [word])
        return subprocess.Popen(command, cwd=self.cluster.home, env=env, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)  # fmt: skip

    def end(self, run: str) -> tuple[int, str]:
        """Wait for a job; return its exit status, and all that it and its ranks have printed."""
        printed = self.running[run].communicate(timeout=250)[0]
        files = [self.cluster.home / f"{run}.out", *(self.cluster.folder(run) / "logs").glob("*.log")]
        return self.running[run].returncode, "\n".join([printed, *(one.read_text() for one in files if one.exists())])


@pytest.fixture(scope="module")
def jobs(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    started = Jobs(Cluster(lab, shards_folder, tmp_path_factory.mktemp("layouts"), 20))
    yield started
    started.cluster.slurm("scancel", "--user", "root")
    for process in started.running.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", FITTING)
def test_each_task_is_a_rank_with_a_gpu_of_its_own(name: str, jobs: Jobs) -> None:
    status, printed = jobs.end(f"fits-{name}")
    found = sorted((json.loads(line) for line in re.findall(r"^\{.*\}$", printed, re.MULTILINE)),
                   key=lambda rank: rank["rank"])  # fmt: skip
    # Slurm chooses where the greater part of an uneven job is: that node counts as the first one.
    ranks_of = Counter(rank["host"] for rank in found)
    hosts = sorted(ranks_of, key=lambda host: -ranks_of[host])
    assert all(rank["gpu"] is None or rank["gpu"] in rank["given"] for rank in found), printed
    # Other jobs are on the nodes, too: the GPUs of this one are counted from 0.
    gpus = {host: sorted({rank["gpu"] for rank in found if rank["host"] == host and rank["gpu"]}) for host in hosts}
    seen = [f"{hosts.index(rank['host'])} {rank['local']} {rank['gpu'] and gpus[rank['host']].index(rank['gpu'])}"
            for rank in found]  # fmt: skip
    assert (status, sorted(seen)) == (0, FITTING[name][2]), printed
    assert sum(one["host"] != next_one["host"] for one, next_one in pairwise(found)) == len(hosts) - 1, printed
    assert [(rank["rank"], rank["size"]) for rank in found] == [(number, len(found)) for number in range(len(found))]


@pytest.mark.parametrize("name", WRONG)
def test_a_layout_that_does_not_fit_ends_with_a_sentence_that_names_the_remedy(name: str, jobs: Jobs) -> None:
    status, printed = jobs.end(f"wrong-{name}")
    assert WRONG[name][2] in printed
    assert "Traceback" not in printed
    assert "no requeue of job" in printed or WRONG[name][0] != "sbatch" or "--wrap" in WRONG[name][1], printed
    # 143: srun ended the other tasks with SIGTERM before they found the same.
    assert status in (USER_MISTAKE, 143), printed
