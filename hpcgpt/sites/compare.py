"""Compares a site file with what this Slurm says: partitions, QOS, limits, and GPUs and cores of the nodes.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpcgpt.output.counted import counted
from hpcgpt.sites.qos import NOT_READABLE, Qos
from hpcgpt.sites.schema import Queue, Site
from hpcgpt.slurm.partitions import Partition, minutes


@dataclass(frozen=True)
class Finding:
    """One comparison. "unknown": Slurm does not show it to this user."""

    queue: str
    result: Literal["agrees", "differs", "unknown"]
    text: str


def compare(site: Site, partitions: Sequence[Partition], qos: Mapping[str, Qos]) -> list[Finding]:
    """Compare each queue of a site file with Slurm's partitions, and with its QOS if there are any."""
    return [finding for queue in site.queue for finding in _of_queue(site, queue, partitions, qos)]


def _of_queue(site: Site, queue: Queue, partitions: Sequence[Partition], qos: Mapping[str, Qos]) -> Iterator[Finding]:
    name, by_name = queue.name, {partition.name: partition for partition in partitions}
    if queue.partition and queue.partition not in by_name:
        yield Finding(name, "differs", f"there is no partition {queue.partition}: there are {', '.join(by_name)}")
        return
    own = [by_name[queue.partition]] if queue.partition else list(partitions)
    limits = Qos()
    if queue.qos and not qos:
        yield Finding(name, "unknown", f"QOS {queue.qos}: {NOT_READABLE}")
    elif queue.qos and queue.qos not in qos:
        yield Finding(name, "differs", f"there is no QOS {queue.qos}: there are {', '.join(qos)}")
    elif queue.qos:
        limits = qos[queue.qos]
    if queue.partition and not own[0].is_up:
        yield Finding(name, "differs", f"partition {queue.partition} is down")
    of_partition = own[0] if queue.partition else None
    yield from _limits(queue, limits, of_partition)
    yield _nodes(site, queue, own)


def _limits(queue: Queue, qos: Qos, partition: Partition | None) -> Iterator[Finding]:
    """Compare the limits of time, nodes and GPUs of one job, by its QOS and its partition."""
    minutes_here = qos.minutes_in(partition.max_minutes if partition else None)
    limits = (qos.most("node"), partition.max_nodes if partition else None)
    nodes_here = min((most for most in limits if most is not None), default=None)
    rows = (
        ("max_time", minutes(queue.max_time), minutes_here, " minutes"),
        ("max_nodes", queue.max_nodes or None, nodes_here, ""),
        ("max_gpus", queue.max_gpus or None, qos.most("gres/gpu"), ""),
    )
    for key, in_file, here, unit in rows:
        if in_file is None and here is None:
            continue
        if in_file is not None and here is None:
            yield Finding(queue.name, "unknown", f"{key} {in_file}{unit}: Slurm shows no such limit to this user")
        elif in_file == here:
            yield Finding(queue.name, "agrees", f"{key} {here}{unit}")
        else:
            written = "no limit" if in_file is None else f"{in_file}{unit}"
            yield Finding(queue.name, "differs", f"{key}: the file has {written}, Slurm {here}{unit}")


def _nodes(site: Site, queue: Queue, partitions: Sequence[Partition]) -> Finding:
    """Compare GPUs and cores: some kind of node of the queue has to be that of the file."""
    node, features = site.node_of(queue), f" with {queue.constraint}" if queue.constraint else ""
    kinds = [kind for partition in partitions for kind in partition.kinds_with(queue.constraint)]
    if not kinds:
        return Finding(queue.name, "differs", f"there are no nodes{features}")
    cpus = node.gpus * node.cpus_per_gpu
    # Where jobs do not request GPUs, Slurm need not know of them.
    unlisted = site.request.form == "none" and not any(kind.gpus for kind in kinds)
    gpus = counted(node.gpus, "GPU") + (" (which Slurm does not list)" if unlisted else "")
    text = f"{gpus} and {counted(cpus, 'CPU')} a node"
    # Cores that the system reserves are counted by sinfo, but not in the file.
    if any((unlisted or kind.gpus == node.gpus) and kind.cpus >= cpus for kind in kinds):
        return Finding(queue.name, "agrees", text)
    there = ", ".join(sorted({f"{counted(kind.gpus, 'GPU')} and {counted(kind.cpus, 'CPU')}" for kind in kinds}))
    return Finding(queue.name, "differs", f"the file has {text}{features}, Slurm {there}")
