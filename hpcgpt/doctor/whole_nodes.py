"""The flags and the environment of a step with one task on each node, which has all of the job's GPUs there.

A step inherits what the job requests. With --gpus-per-task its one task would get one task's GPUs, and with --gpus the
GPUs of a node may go to other nodes' tasks; of GPUs that the job only has by --exclusive it would get none. (Seen on
Slurm 22.05.) So the GPUs are requested by number.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping

_OF_TASKS = ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK")


def flags(count: int, env: Mapping[str, str]) -> list[str]:
    """Return the flags of srun for a step on `count` nodes. `env`: that of the job, whose nodes are alike."""
    gpus = env.get("SLURM_GPUS_ON_NODE", "0")  # not set in the shell of salloc
    return [f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--overlap", "--kill-on-bad-exit=0",
            *([f"--gpus-per-node={gpus}"] if gpus.isdigit() and int(gpus) else [])]  # fmt: skip


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for srun: without the requests that belong to the job's own tasks."""
    return {key: value for key, value in env.items() if key not in _OF_TASKS} | {"SLURM_EXPORT_ENV": "ALL"}
