"""Check how a job is divided into ranks and GPUs, from Slurm's variables alone, before torch is loaded.

Every mistake here costs money unseen: a rank that trains alone while seven others of its job were never started, GPUs
that are allocated and idle, a run on the CPU of a node with GPUs.

SLURM_GPUS_ON_NODE counts the GPUs of the step on this node, also if each task sees only its own (--gpus-per-task).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from hpcgpt.distributed.world import World, allocated_gpus
from hpcgpt.errors import UserError

_REQUESTED = ("SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")


def check(here: World, requested: str, env: Mapping[str, str] = os.environ) -> None:
    """Check the layout of this process's job. `requested` is run.device: auto, cpu or cuda.

    Raises:
        UserError: this process would train alone in a job of several tasks, or without the job's GPUs; a node has more
            ranks than GPUs, or fewer.
    """
    if here.launcher == "alone" and env.get("SLURM_JOB_ID"):
        _check_alone(requested, env)
    if here.launcher == "srun" and requested != "cpu" and (gpus := allocated_gpus(env)):
        _check_gpus(here, gpus)


def why_no_gpu(here: World, requested: str, env: Mapping[str, str] = os.environ) -> str:
    """Return a warning for a run on the CPU that may have been meant for GPUs; '' if it was not."""
    if here.launcher != "srun" or requested != "auto" or env.get("SLURM_GPUS_PER_NODE") == "0":
        return ""
    return (
        f"job {env.get('SLURM_JOB_ID')} has not asked for GPUs: this run is on the CPU. Ask for them with "
        "--gpus-per-node=N, or pass --run.device cpu"
    )


def _check_alone(requested: str, env: Mapping[str, str]) -> None:
    job, tasks, nodes = env["SLURM_JOB_ID"], env.get("SLURM_NTASKS", "1"), env.get("SLURM_NNODES", "1")
    is_outside = "SLURMD_NODENAME" not in env  # a shell of salloc, on the host where salloc was called
    wants_gpus = requested != "cpu" and any(env.get(name, "0") != "0" for name in _REQUESTED)
    if tasks != "1" or nodes != "1":
        why = f"job {job} has {_count(tasks, 'task')} on {_count(nodes, 'node')}, and this process would train alone"
    elif is_outside and wants_gpus:
        why = f"job {job} has GPUs, and this process is on {socket.gethostname()}, outside of the job's nodes"
    else:
        return
    raise UserError(
        f"{why}: it was started without srun. Put srun in front of it: srun python -m hpcgpt.train ...; "
        "or, for one rank on purpose: srun --nodes=1 --ntasks=1 python -m hpcgpt.train ..."
    )


def _check_gpus(here: World, gpus: int) -> None:
    """Compare the ranks on this node with its GPUs."""
    ranks = _count(here.local_size, "rank")
    found = f"{socket.gethostname()} has {ranks}, and Slurm gave this step {_count(gpus, 'GPU')} there"
    if here.local_size > gpus:
        raise UserError(
            f"{found}: each rank needs a GPU of its own. Ask for as many GPUs a node as tasks a node: "
            f"--ntasks-per-node={gpus} --gpus-per-node={gpus}, or --gpus-per-task=1"
        )
    if gpus > here.local_size:
        raise UserError(
            f"{found}: {gpus - here.local_size} would be idle. Start a rank for each: --ntasks-per-node={gpus}; or ask "
            f"for fewer: --gpus-per-node={here.local_size} (where a job is given whole nodes: of srun, for the batch "
            "script in HPCGPT_SRUN_FLAGS)"
        )


def _count(number: int | str, noun: str) -> str:
    return f"{number} {noun}" if str(number) == "1" else f"{number} {noun}s"
