"""Rank, world size, host and device of this process.

Three launchers are distinguished by variables that only they set:

    torchrun   TORCHELASTIC_RUN_ID, with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE
    srun       SLURM_STEP_NUM_TASKS, with SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST
    alone      neither: also a shell inside an allocation, where SLURM_* is set but there is no step

torchrun is checked first, since srun may have started it, and then torchrun's ranks are the right ones. No other module
reads these variables.

How ranks connect: ``hpcgpt.distributed.rendezvous``. Torch is imported inside functions, since login nodes import this
module too.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpcgpt.errors import NodeError, UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Rank and world size of this process. `hosts` are the nodes of the srun step, in Slurm's order; else empty."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    launcher: Literal["srun", "torchrun", "alone"]
    attempt: str
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} on {socket.gethostname()}"


def discover(env: Mapping[str, str] = os.environ) -> World:
    """Read rank and world size from the launcher's variables.

    Raises:
        UserError: the launcher's variables contradict each other, or one is missing.
    """
    try:
        found = _found(env)
    except KeyError as error:
        raise UserError(f"the launcher did not set {error.args[0]}: start the ranks with srun or torchrun") from None
    if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
        raise UserError(f"the variables of {found.launcher} contradict each other: {found}")
    return found


def _found(env: Mapping[str, str]) -> World:
    if "TORCHELASTIC_RUN_ID" in env:
        attempt = f"torchrun_{env['TORCHELASTIC_RUN_ID']}_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return World(
            int(env["RANK"]),
            int(env["LOCAL_RANK"]),
            int(env["WORLD_SIZE"]),
            int(env["LOCAL_WORLD_SIZE"]),
            "torchrun",
            re.sub(r"\W", "_", attempt),
        )
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        hosts = expand_hosts(env.get("SLURM_STEP_NODELIST", ""))
        step = env.get("SLURM_STEP_ID", "0")
        return World(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_LOCALID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            _tasks_here(env),
            "srun",
            f"{job_start(env)}_{step}",
            tuple(hosts),
        )
    return World(0, 0, 1, 1, "alone", f"alone_{socket.gethostname()}_{os.getpid()}")


def job_start(env: Mapping[str, str] = os.environ) -> str:
    """Return the name of this start of this Slurm job, different after each requeue; '' outside of a job."""
    job = env.get("SLURM_JOB_ID", "")
    return f"{job}_{env.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def expand_hosts(text: str) -> list[str]:
    """Expand Slurm's host lists: 'n[1-2,07],m' -> n1, n2, n07, m."""
    hosts = []
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        hosts += _expand(name)
    return hosts


def _expand(name: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", name)
    if not found:
        return [name]
    before, ranges, after = found.groups()
    numbers: list[str] = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        numbers += [f"{n:0{len(low)}d}" for n in range(int(low), int(high or low) + 1)]
    return [before + number + tail for number in numbers for tail in _expand(after)]


def _tasks_here(env: Mapping[str, str]) -> int:
    """Return the step's tasks on this node, from lists like '2(x3),1': two on each of three nodes, one on the next."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]).split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]


# --- the device ------------------------------------------------------------------------------------


def device_index(world: World, visible: int, requested: str, allocated: int) -> int | None:
    """Return which of the `visible` GPUs this rank uses; None: the CPU.

    `allocated` is how many GPUs Slurm gave this job on this node. The index is the local rank if that GPU is visible,
    or 0 if exactly one is visible, because Slurm hides the other tasks' GPUs.

    Raises:
        UserError: a GPU was requested and there is none, or the job has fewer GPUs than tasks.
        NodeError: torch sees fewer GPUs than Slurm gave: a GPU or the driver has failed.
    """
    if requested == "cpu":
        return None
    if not visible:
        if requested == "cuda" or allocated:
            why = "run.device is cuda" if requested == "cuda" else "Slurm gave this job GPUs"
            raise (NodeError if allocated else UserError)(
                f"{why}, but torch sees none ({world}): check the driver and that torch is a CUDA "
                "build, or pass --run.device cpu"
            )
        return None
    if world.local_rank < visible:
        return world.local_rank
    if visible == 1:
        return 0
    if allocated > visible:
        raise NodeError(
            f"{world}: Slurm gave this job {allocated} GPUs here, but torch sees {visible}: a GPU has failed"
        )
    raise UserError(
        f"{world} is local rank {world.local_rank}, but only {visible} GPUs are visible: ask for as "
        "many GPUs a node as tasks a node"
    )


def pick_device(world: World, requested: str, env: Mapping[str, str] = os.environ) -> torch.device:
    """Return the device of this rank. CUDA_VISIBLE_DEVICES is left to torch."""
    import torch

    allocated = allocated_gpus(env) if world.launcher == "srun" else 0
    index = device_index(world, torch.cuda.device_count(), requested, allocated)
    if index is None:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def allocated_gpus(env: Mapping[str, str]) -> int:
    """Return how many GPUs Slurm gave this job on this node."""
    count = env.get("SLURM_GPUS_ON_NODE", "")
    ids = env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or ""
    return int(count) if count.isdigit() else len(expand_hosts(f"[{ids}]")) if ids else 0


def cores(world: World, env: Mapping[str, str] = os.environ) -> int:
    """Return the CPU cores of this rank: Slurm's count for a task, else an equal share of those of this process."""
    allowed = min(len(os.sched_getaffinity(0)), cgroup_cpu_limit() or 10**6)
    if world.launcher == "srun" and env.get("SLURM_CPUS_PER_TASK"):
        return min(allowed, int(env["SLURM_CPUS_PER_TASK"]))
    return max(1, allowed // world.local_size)


def cgroup_cpu_limit(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the CPU limit of this process's cgroup in cores, at least 1; None without a limit.

    Containers are limited in this way, which CPU affinity does not show: 64 threads on 2 cores would wait for each
    other. The smallest limit counts, of the cgroup or one above it (version 2: ``cpu.max``, microseconds per period).
    """
    try:
        name = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    folder, found = root / name.lstrip("/"), []
    for path in (folder, *folder.parents):
        with suppress(OSError, ValueError):  # no such file, or "max"
            most, period = (path / "cpu.max").read_text().split()
            found.append(int(most) // int(period))
    return max(1, min(found)) if found else None


# --- all of them -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """The connected ranks. `cpu_group` is the process group for CPU tensors and objects; None if there is one rank."""

    world: World
    device: torch.device
    cpu_group: dist.ProcessGroup | None
