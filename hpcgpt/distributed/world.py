"""Rank, world size, host and device of this process.

Five launchers are distinguished by variables that only they set, in this order:

    torchrun   TORCHELASTIC_RUN_ID, with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE
    mpirun     Open MPI: OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE
               MPICH, Intel MPI: PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS; PALS: PMI_LOCAL_RANK, _SIZE
    srun       SLURM_STEP_NUM_TASKS, with SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NODELIST
    env        RANK and WORLD_SIZE, set by hand or by a script, with LOCAL_RANK, MASTER_ADDR, MASTER_PORT, and
               LOCAL_WORLD_SIZE where MASTER_ADDR is another host
    alone      none of these: also a shell inside an allocation, where SLURM_* is set but there is no step

torchrun and mpirun come before srun, which may have started them: then their ranks are the right ones. But an MPI's
variables that srun itself has set (--mpi=pmi2, cray_shasta) agree with srun's, and then srun is the launcher. RANK and
WORLD_SIZE that contradict the launcher's are an error, and so is an MPI that says only half. No other module reads
these variables.

How ranks connect: ``hpcgpt.distributed.rendezvous``. Torch is imported inside functions, since login nodes import this
module too.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hpcgpt.errors import NodeError, UserError
from hpcgpt.output import terminal

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hpcgpt.distributed.node_channel import Follower, Leader


@dataclass(frozen=True)
class World:
    """Rank and world size of this process. `hosts` are the nodes of the srun step, in Slurm's order; else empty."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    launcher: Literal["torchrun", "mpirun", "srun", "env", "alone"]
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
        raise UserError(
            f"the launcher did not set {error.args[0]}: start the ranks with srun, torchrun or mpirun"
        ) from None
    if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
        raise UserError(f"the variables of {found.launcher} contradict each other: {found}")
    return found


def _found(env: Mapping[str, str]) -> World:
    if "TORCHELASTIC_RUN_ID" in env:
        attempt = f"torchrun_{env['TORCHELASTIC_RUN_ID']}_{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        rank, local_rank, size, local_size = _numbers(env, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return World(rank, local_rank, size, local_size, "torchrun", re.sub(r"\W", "_", attempt))
    if names := _mpi_names(env):
        _check_agreement(env, names[0], names[2])
        rank, local_rank, size, local_size = _numbers(env, names)
        # The same on all ranks; where there is no name of this start, the published address has a token.
        start = env.get("PMIX_NAMESPACE", "") or job_start(env) or "mpi"
        attempt = f"mpirun_{re.sub(r'[^0-9A-Za-z]', '_', start)}"
        return World(rank, local_rank, size, local_size, "mpirun", attempt)
    if _has_srun_step(env):
        _check_agreement(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        rank, local_rank, size = _numbers(env, ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"))
        hosts = tuple(expand_hosts(env.get("SLURM_STEP_NODELIST", "")))
        attempt = f"{job_start(env)}_{env.get('SLURM_STEP_ID', '0')}"
        return World(rank, local_rank, size, _tasks_here(env), "srun", attempt, hosts)
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_plain_variables(env)
    if name := next((name for name in _MPI_HINTS if name in env), ""):
        raise UserError(
            f"an MPI has started this process ({name} is set), but not said how many processes there are: it would "
            "train alone. Use srun, torchrun, or an mpirun of Open MPI or MPICH; or set RANK, WORLD_SIZE, LOCAL_RANK, "
            "LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return World(0, 0, 1, 1, "alone", f"alone_{socket.gethostname()}_{os.getpid()}")


# By MPI: rank, local rank, world size, local size.
_MPIS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("PMI_RANK", "PMI_LOCAL_RANK", "PMI_SIZE", "PMI_LOCAL_SIZE"),
)
_MPI_HINTS = ("PMIX_RANK", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")
_LOOPBACK = ("localhost", "127.", "::1")


def _has_srun_step(env: Mapping[str, str]) -> bool:
    return "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env


def _mpi_names(env: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Return the variables of the mpirun that started this process; None if none did."""
    for names in _MPIS:
        rank, _, size, _ = names
        if rank not in env or size not in env:
            continue
        from_srun = _has_srun_step(env) and (env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]) == (env[rank], env[size])
        if not from_srun and all(name in env for name in names):
            return names
    return None


def _from_plain_variables(env: Mapping[str, str]) -> World:
    """Read RANK, WORLD_SIZE and so on, which were set by hand or by a script.

    Raises:
        UserError: one is missing.
    """
    needed = ["RANK", "WORLD_SIZE"]
    if env.get("WORLD_SIZE") != "1":
        needed += ["LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
        if not env.get("MASTER_ADDR", "").startswith(_LOOPBACK):  # else all ranks are on this host
            needed.append("LOCAL_WORLD_SIZE")
    if missing := [name for name in needed if name not in env]:
        set_here = [f"{name}={env[name]}" for name in needed if name in env]
        raise UserError(
            f"{' and '.join(set_here)} {'are' if len(set_here) > 1 else 'is'} set, but not {', '.join(missing)}: set "
            f"{' and '.join(needed)}; or, to train with this process alone: unset RANK WORLD_SIZE"
        )
    rank, size = _numbers(env, ("RANK", "WORLD_SIZE"))
    local_rank = _numbers(env, ("LOCAL_RANK",))[0] if "LOCAL_RANK" in env else 0
    local_size = _numbers(env, ("LOCAL_WORLD_SIZE",))[0] if "LOCAL_WORLD_SIZE" in env else size
    address = f"{env.get('MASTER_ADDR', '')}_{env.get('MASTER_PORT', '')}"
    return World(rank, local_rank, size, local_size, "env", re.sub(r"\W", "_", f"env_{address}"))


def _check_agreement(env: Mapping[str, str], rank: str, size: str) -> None:
    """Raise UserError if RANK or WORLD_SIZE is set and is not what the launcher says in `rank` and `size`."""
    for plain, name in (("RANK", rank), ("WORLD_SIZE", size)):
        if plain in env and name in env and env[plain] != env[name]:
            raise UserError(
                f"{plain} is {env[plain]}, but {name} is {env[name]}: which of them is right? If it is {name}, which "
                f"the launcher has set: unset RANK WORLD_SIZE; else start the ranks without that launcher"
            )


def _numbers(env: Mapping[str, str], names: Sequence[str]) -> list[int]:
    """Return the values of these variables. Raises KeyError if one is missing, UserError if one is no number."""
    try:
        return [int(env[name]) for name in names]
    except ValueError:
        wrong = next(name for name in names if not re.fullmatch(r"\s*[+-]?\d+\s*", env[name]))
        raise UserError(f"{wrong} is '{terminal.printable(env[wrong])}', expected a whole number") from None


def of_torchrun(environment: Mapping[str, str], rank: int, size: int, job: str) -> dict[str, str]:
    """Return the environment of one of `size` ranks on this machine, with the variables that torchrun sets.

    Those of a step of srun, in which this process may run, are left out. `job` names these ranks.
    """
    kept = {key: value for key, value in environment.items() if not key.startswith(("SLURM_STEP", "SLURM_PROCID"))}
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return kept | {key: str(number) for key, number in place.items()} | {"TORCHELASTIC_RUN_ID": job}


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
                f"{why}, but torch sees none ({world}): check the driver and that torch is a "
                "CUDA or ROCm build, or pass --run.device cpu"
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


def same_gpu(world: World, device: str, env: Mapping[str, str] = os.environ) -> UserError | NodeError:
    """Return the error of two ranks that use the same GPU.

    Where Slurm gave a node enough GPUs it is the node's: with one left of two, each rank takes it for its own.
    """
    shared = f"{world}: another rank uses {device} as well"
    if world.launcher == "srun" and (allocated := allocated_gpus(env)) >= world.local_size:
        return NodeError(
            f"{shared}, though Slurm gave this job {allocated} GPUs here: one has failed, or --gpu-bind or a variable "
            "like CUDA_VISIBLE_DEVICES gives several tasks the same one"
        )
    return UserError(f"{shared}: ask for one GPU a task")


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
    if env.get("OMPI_MCA_orte_bound_at_launch") == "1":  # Open MPI has bound each rank to a core, or to all of a socket
        return max(1, min(allowed, min(os.cpu_count() or 1, cgroup_cpu_limit() or 10**6) // world.local_size))
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
    """The connected ranks. `cpu_group` is the process group for CPU tensors and objects; None if there is one rank.

    `channel` connects the ranks of this node, if there are several. `store_server` has to be kept.
    """

    world: World
    device: torch.device
    cpu_group: dist.ProcessGroup | None
    channel: Leader | Follower | None = None
    store_server: subprocess.Popen[bytes] | None = None
