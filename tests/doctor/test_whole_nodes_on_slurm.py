"""hpcgpt.doctor.whole_nodes on a real Slurm, whose nodes have two GPUs: a step with one task per node has both."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lab_conf import Lab

from tests.programs import ROOT, clean_env

STEP = """
import os, subprocess
from hpcgpt.doctor import whole_nodes
show = ["bash", "-c", "echo gpus=${SLURM_STEP_GPUS-none}"]
command = ["srun", *whole_nodes.flags(2, os.environ), "--cpus-per-task=1", *show]
subprocess.run(command, env=whole_nodes.environment(os.environ), check=True)
"""


@pytest.mark.parametrize(
    "request_",
    ["--exclusive --ntasks-per-node=1", "--gpus-per-task=1 --ntasks-per-node=2", "--gpus=4 --ntasks-per-node=2",
     "--gres=gpu:2 --ntasks-per-node=2", "--gpus-per-node=2 --ntasks-per-node=2"],
)  # fmt: skip
def test_the_one_task_of_each_node_has_all_gpus(lab: Lab, request_: str, tmp_path: Path) -> None:
    script = f"#!/bin/bash\ncd {shlex.quote(str(ROOT))}\nexec {shlex.quote(sys.executable)} -c {shlex.quote(STEP)}\n"
    command = ["sbatch", "--wait", "--nodes=2", "--time=5", f"--output={tmp_path}/log", *request_.split()]
    done = subprocess.run(command, input=script, text=True, env=clean_env() | lab.environ(), timeout=200, check=False)
    log = (tmp_path / "log").read_text()
    assert (done.returncode, log.split()) == (0, ["gpus=0,1", "gpus=0,1"]), log
