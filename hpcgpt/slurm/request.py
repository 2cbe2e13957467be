"""What a job requests: the flags that the user wrote, and for the rest what the partition's nodes have.

One task for each GPU, and cores and memory in proportion: a job with 2 of a node's 8 GPUs gets a quarter of its
cores and memory. Without GPUs, a task for each node with all of its cores. Every flag that is written is kept as it is.

Limits that sinfo shows are checked before the job is queued. A job that waits for a day and then is never started, or
trains on one GPU of eight, is what these checks are for.

No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted
from hpcgpt.slurm.partitions import NodeKind, Partition, gpus_in, minutes
from hpcgpt.slurm.sbatch_flags import GPU_FLAGS, MEMORY_FLAGS, Flags

DEFAULT_MINUTES = 24 * 60
_NOT_COUNTED = {
    "ntasks-per-gpu": "there is one rank for each GPU, as with --gpus-per-node alone",
    "gpus-per-socket": "give --gpus-per-node",
}


@dataclass(frozen=True)
class Request:
    """The complete flags of a job, its number of ranks, and sentences about what was chosen for the user.

    `gpu_type`: the name that the requested GPUs have in Slurm, "" if they have none or it is not known.
    """

    flags: Flags
    nodes: int
    ranks: int
    gpus_per_node: int
    gpu_type: str
    notes: tuple[str, ...]

    @property
    def idle_gpus(self) -> int:
        """Return how many of the GPUs no rank would use: a rank uses one."""
        return max(self.gpus_per_node * self.nodes - self.ranks, 0)


def complete(
    wanted: Flags,
    partitions: Sequence[Partition],
    no_answer: str,
    environment: Mapping[str, str],
    not_counted: Callable[[Flags], Collection[str]] = lambda _: (),
) -> Request:
    """Complete the flags that the user wrote.

    `partitions` is what sinfo lists; if it lists none, `no_answer` says why, and only what the user wrote is requested.
    `environment` may choose a partition with SBATCH_PARTITION, as for sbatch. `not_counted` is asked which of the
    partition's limits do not count for a job that exceeds one (hpcgpt.sites.qos.over_partition).

    Raises:
        UserError: the GPUs of a node are not known, the nodes have none, or the job exceeds a limit.
    """
    for name in _NOT_COUNTED.keys() & wanted.keys():
        raise UserError(f"--{name}: hpcgpt does not count these: {_NOT_COUNTED[name]}")
    flags = dict(wanted)
    nodes = _count(flags.setdefault("nodes", "1"), "nodes")
    partition = _partition(flags, partitions, environment)
    kinds = partition.kinds_with(flags.get("constraint", "")) if partition else ()
    if partition and not kinds:
        features = sorted(set().union(*(kind.features for kind in partition.kinds)))
        raise UserError(
            f"no node of partition {partition.name} has --constraint={flags['constraint']}: their features are "
            f"{', '.join(features) or 'none'}"
        )
    notes: list[str] = []
    if not written_for_gpus(flags):
        flags["gpus-per-node"] = _default_gpus(partition, kinds, partitions, no_answer, notes)
    gpus = gpus_per_node(flags, nodes)
    if gpus and (named := _written_type(flags)):
        # If no node has it, Slurm says so.
        kinds = tuple(kind for kind in kinds if named in kind.gpu_types) or kinds
    elif gpus:
        _note_unlike(kinds, gpus, notes)
    if gpus == 0 and flags.get("gpus-per-node") == "0":
        del flags["gpus-per-node"]  # Slurm 22.05 takes 0 for a request of the gres
    if "ntasks" not in flags and "ntasks-per-node" not in flags:
        flags["ntasks-per-node"] = str(max(gpus, 1))
    ranks = _ranks(flags, nodes)
    _check_ranks(flags, nodes, ranks, gpus)
    kind = _kind_for(gpus, kinds)
    if kind:
        _add_cores_and_memory(flags, kind, gpus, -(-ranks // nodes))
    if partition:
        _set_time(flags, partition, notes)
        notes += _check_limits(flags, partition, nodes, not_counted)
        _check_nodes(flags, partition, kinds, nodes, gpus)
    flags.setdefault("time", "24:00:00")
    return Request(flags, nodes, ranks, gpus, _gpu_type(flags, kind) if gpus else "", tuple(notes))


def gpus_per_node(flags: Flags, nodes: int) -> int:
    """Return how many GPUs of a node the flags request; with ``--gpus``, which Slurm distributes, the mean."""
    if text := flags.get("gpus-per-node"):
        return _sum_of_types(text, "gpus-per-node")
    if text := flags.get("gpus"):
        return -(-_sum_of_types(text, "gpus") // nodes)
    tasks_per_node = -(-_ranks(flags, nodes) // nodes)
    if text := flags.get("gpus-per-task"):
        return _sum_of_types(text, "gpus-per-task") * tasks_per_node
    if "gpu" in written_for_gpus(flags).get("tres-per-task", ""):
        return sum(count for _, count in gpus_in(flags["tres-per-task"])) * tasks_per_node
    return sum(count for _, count in gpus_in(flags.get("gres", "")))


def written_for_gpus(flags: Flags) -> Flags:
    """Return the flags that request GPUs, without one of other gres, as ``--gres=nvme:100`` is."""
    return {name: flags[name] for name in GPU_FLAGS if name in flags
            and (name not in ("gres", "tres-per-task") or gpus_in(flags[name]))}  # fmt: skip


def _check_ranks(flags: Flags, nodes: int, ranks: int, gpus: int) -> None:
    """Check that each rank can have a GPU of its own, and --gpus the same number on each node."""
    if "gpus" in flags and "gpus-per-node" not in flags and (total := _sum_of_types(flags["gpus"], "gpus")) % nodes:
        raise UserError(
            f"--gpus={flags['gpus']} on --nodes={nodes}: {total} GPUs cannot be the same number on each node, as the "
            "ranks need: give --gpus-per-node"
        )
    each = -(-ranks // nodes)
    if gpus and each > gpus:
        raise UserError(
            f"{each} ranks per node on {counted(gpus, 'GPU')}: each rank needs one of its own, so leave "
            f"out --ntasks and --ntasks-per-node, or give --ntasks-per-node={gpus}"
        )


def _note_unlike(kinds: Sequence[NodeKind], gpus: int, notes: list[str]) -> None:
    """Warn if a request without a type can get several: on unlike GPUs all ranks wait for the slowest."""
    enough = [kind for kind in kinds if kind.gpus >= gpus]
    named = [name for kind in enough for name in kind.gpu_types if name]
    if named and _are_unlike(enough):
        there = ", ".join(dict.fromkeys(kind.gpu_text for kind in enough))
        notes.append(
            f"Slurm may give the job unlike GPUs ({there}): name one, as in --gpus-per-node={named[0]}:{gpus}, or "
            "choose with --constraint"
        )


def _are_unlike(kinds: Sequence[NodeKind]) -> bool:
    return len({frozenset(kind.gpu_types) for kind in kinds}) > 1


def _gpu_type(flags: Flags, kind: NodeKind | None) -> str:
    """Return the type in a flag; else that of the nodes."""
    return _written_type(flags) or (kind.gpu_types[0] if kind and len(kind.gpu_types) == 1 else "")


def _written_type(flags: Flags) -> str:
    """Return the type in a flag, as in ``a100:4`` or ``gpu:a100:4``; "" without one."""
    for name, text in written_for_gpus(flags).items():
        is_gres = name in ("gres", "tres-per-task")
        for named, _ in gpus_in(text if is_gres else ",".join(f"gpu:{part}" for part in text.split(","))):
            if named:
                return named
    return ""


def _partition(flags: Flags, partitions: Sequence[Partition], environment: Mapping[str, str]) -> Partition | None:
    """Return the partition of the job; None if Slurm does not answer, or the flags name several."""
    if not partitions:
        return None
    name = flags.get("partition") or environment.get("SBATCH_PARTITION", "")
    if "," in name:
        return None
    if not name:
        return next((found for found in partitions if found.is_default), None)
    found = {partition.name: partition for partition in partitions}
    if name not in found:
        raise UserError(f"there is no partition {name}: there are {', '.join(found)}" + nearest(name, list(found)))
    return found[name]


def _default_gpus(
    partition: Partition | None, kinds: Sequence[NodeKind], partitions: Sequence[Partition], no_answer: str,
    notes: list[str],
) -> str:  # fmt: skip
    """Return the GPUs that the most common kind of node has, as --gpus-per-node takes them.

    The type is named where other nodes have another one.
    """
    if not partition:
        reason = f"Slurm does not answer ({no_answer})" if no_answer else "the partition is not known"
        raise UserError(f"{reason}, so say what to request: --gpus-per-node N, or --gpus-per-node 0 for CPUs only")
    with_gpus = [kind for kind in kinds if kind.gpus]
    if not with_gpus:
        others = [other.name for other in partitions if any(kind.gpus for kind in other.kinds)]
        there = f"partitions with GPUs: {', '.join(others)}" if others else "no partition has any"
        raise UserError(
            f"the nodes of partition {partition.name} have no GPUs ({there}). Name a partition with --partition, or "
            "train on CPUs: --gpus-per-node 0"
        )
    best = max(with_gpus, key=lambda kind: (kind.usable, kind.count, kind.gpus))
    is_named = _are_unlike(with_gpus) and len(best.gpu_types) == 1 and best.gpu_types[0]
    gpus = f"{best.gpu_types[0]}:{best.gpus}" if is_named else str(best.gpus)
    notes.append(f"--gpus-per-node={gpus}: nodes of partition {partition.name} have {best.gpu_text}")
    return gpus


def _kind_for(gpus: int, kinds: Sequence[NodeKind]) -> NodeKind | None:
    """Return the smallest kind of node that has so many GPUs, of the usable ones if there are any."""
    enough = [kind for kind in kinds if kind.gpus >= gpus]
    return min(enough, key=lambda kind: (not kind.usable, kind.gpus, kind.cpus, kind.memory_mb), default=None)


def _add_cores_and_memory(flags: Flags, kind: NodeKind, gpus: int, tasks: int) -> None:
    """Request cores and memory in proportion to the GPUs; all if no GPU, or every one, is requested."""
    whole = gpus in (0, kind.gpus)
    if "cpus-per-task" not in flags and "cpus-per-gpu" not in flags:
        cpus = kind.cpus if whole else kind.cpus * gpus // kind.gpus
        flags["cpus-per-task"] = str(max(cpus // tasks, 1))
    if not any(name in flags for name in MEMORY_FLAGS) and kind.memory_mb > 1:  # 1: the site does not count memory
        flags["mem"] = "0" if whole else f"{kind.memory_mb * gpus // kind.gpus}M"  # 0: all of the node's


def _set_time(flags: Flags, partition: Partition, notes: list[str]) -> None:
    most = partition.max_minutes
    if "time" not in flags and most is not None and most < DEFAULT_MINUTES:
        flags["time"] = str(most)
        notes.append(f"--time={most}: the longest that partition {partition.name} allows, in minutes")


def _check_limits(
    flags: Flags, partition: Partition, nodes: int, not_counted: Callable[[Flags], Collection[str]]
) -> list[str]:
    """Check the limits of the partition; return notes on those that the job exceeds and that may not count."""
    name = partition.name
    if not partition.is_up:
        raise UserError(f"partition {name} is down: jobs in it are not started")
    exceeded = {}
    asked = minutes(flags.get("time", ""))
    if asked is not None and partition.max_minutes is not None and asked > partition.max_minutes:
        exceeded["PartitionTimeLimit"] = (
            f"--time={flags['time']} is more than partition {name} allows, {partition.max_minutes} minutes: request "
            f"--time={partition.max_minutes}; a longer run is requeued at the limit and continues"
        )
    if partition.max_nodes is not None and nodes > partition.max_nodes:
        exceeded["PartitionMaxNodes"] = (
            f"--nodes={nodes}: a job in partition {name} may have {partition.max_nodes} at most"
        )
    if nodes < partition.min_nodes:
        exceeded["PartitionMinNodes"] = f"--nodes={nodes}: a job in partition {name} has at least {partition.min_nodes}"
    free = not_counted(flags) if exceeded else ()
    for limit, sentence in exceeded.items():
        if limit not in free:
            raise UserError(sentence)
    return [f"{sentence} (not refused, since its QOS may allow more)" for sentence in exceeded.values()]


def _check_nodes(flags: Flags, partition: Partition, kinds: Sequence[NodeKind], nodes: int, gpus: int) -> None:
    name = partition.name
    enough = sum(kind.count for kind in kinds if kind.gpus >= gpus)
    if not enough:
        most = max(kind.gpus for kind in kinds)
        raise UserError(f"{counted(gpus, 'GPU')} per node: no node of partition {name} has more than {most}")
    if nodes > enough:
        constraint = f" and --constraint={flags['constraint']}" if "constraint" in flags else ""
        having = f" with {counted(gpus, 'GPU')}{constraint}" if gpus else constraint.replace(" and", " with")
        raise UserError(f"--nodes={nodes}: partition {name} has {counted(enough, 'node')}{having}")


def _ranks(flags: Flags, nodes: int) -> int:
    if "ntasks" in flags:
        return _count(flags["ntasks"], "ntasks")
    return nodes * _count(flags.get("ntasks-per-node", "1"), "ntasks-per-node")


def _count(text: str, flag: str) -> int:
    """Return a number from 1; of ``2-4``, which lets Slurm choose, nothing is known before the start."""
    if not re.fullmatch("[1-9][0-9]*", text):
        raise UserError(f"--{flag}={text}: expected a whole number of at least 1")
    return int(text)


def _sum_of_types(text: str, flag: str) -> int:
    """Return the number of GPUs in ``4``, ``a100:4`` or ``a100:2,v100:2``."""
    counts = [part.rpartition(":")[2] for part in text.split(",")]
    if not all(re.fullmatch("[0-9]+", count) for count in counts):
        raise UserError(f"--{flag}={text}: expected a number of GPUs, as in --{flag}=4 or --{flag}=a100:4")
    return sum(map(int, counts))
