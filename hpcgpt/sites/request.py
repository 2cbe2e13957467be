"""The flags of sbatch for a job at a site: partition, QOS and constraint, account, GPUs, cores and memory.

`fill` adds what the user left open. What the site's limits forbid, or what would wait in the queue for ever, is refused
with a sentence. hpcgpt.slurm.request then compares the flags with what sinfo says.

No torch in here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted
from hpcgpt.sites.schema import Node, Queue, Site
from hpcgpt.slurm.partitions import minutes
from hpcgpt.slurm.request import DEFAULT_MINUTES, gpus_per_node, written_for_gpus
from hpcgpt.slurm.sbatch_flags import GPU_FLAGS, MEMORY_FLAGS

_CHOICE = ("partition", "qos", "constraint")


@dataclass(frozen=True)
class Filled:
    """Flags of sbatch by name, complete as far as the site file goes; `queue` is None if the file has no such queue.

    `not_wanted`: flags that this site does not take, so they may not be added. `notes`: what was chosen, as sentences.
    """

    flags: dict[str, str]
    queue: Queue | None
    not_wanted: frozenset[str]
    notes: tuple[str, ...]


def fill(site: Site, wanted: Mapping[str, str], environment: Mapping[str, str]) -> Filled:
    """Complete the flags that the user wrote.

    `environment` may have the account and the queue, as for sbatch: SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_QOS and
    SBATCH_CONSTRAINT. They count as written; sbatch reads them itself.

    Raises:
        UserError: no queue of the site allows the job, the account is missing or is not one for these GPUs, or the
            GPUs are requested in a way that the site does not have.
    """
    flags, notes = dict(wanted), list[str]()
    inherited = {key: environment[name] for key in ("account", *_CHOICE)
                 if key not in flags and environment.get(name := f"SBATCH_{key.upper()}")}  # fmt: skip
    nodes, limit = _count(flags, "nodes"), minutes(flags.get("time", ""))
    queue = _choose(site, flags | inherited, nodes, limit, notes)
    if not queue:
        return Filled(flags, None, _not_wanted(site), tuple(notes))
    node = site.node_of(queue)
    flags.setdefault("nodes", "1")
    for key in _CHOICE:
        if (value := getattr(queue, key)) and key not in inherited:
            flags.setdefault(key, value)
    if not queue.max_time:
        notes.append(f"the file of {site.name} has no time limit for {queue.name}: a job above it would wait for ever")
    elif "time" not in flags:
        longest = minutes(queue.max_time) or DEFAULT_MINUTES
        flags["time"] = queue.max_time if longest < DEFAULT_MINUTES else "24:00:00"
    _check_account(site, queue, (flags | inherited).get("account", ""))
    gpus = _request_gpus(site, node, flags, nodes, notes)
    if "ntasks" not in flags:
        flags.setdefault("ntasks-per-node", str(max(gpus, 1)))
    tasks = _count(flags, "ntasks-per-node") if "ntasks-per-node" in flags else -(-_count(flags, "ntasks") // nodes)
    if gpus and not flags.keys() & {"cpus-per-task", "cpus-per-gpu"}:
        flags["cpus-per-task"] = str(max(node.cpus_per_gpu * gpus // tasks, 1))
    if gpus and site.request.memory and node.memory_gb and not flags.keys() & set(MEMORY_FLAGS):
        flags["mem"] = f"{node.memory_gb * gpus // node.gpus}G"
    for key, value in [*site.request.flags.items(), *site.request.plugin_flags.items()]:
        flags.setdefault(key, value)
    if site.compute_nodes.internet is False and not site.compute_nodes.proxy:
        notes.append("compute nodes have no internet: --tracking.wandb offline, and later `hpcgpt tracking sync RUN`")
    return Filled(flags, queue, _not_wanted(site), tuple(notes))


def _not_wanted(site: Site) -> frozenset[str]:
    return frozenset(() if site.request.memory else MEMORY_FLAGS) | (
        frozenset(GPU_FLAGS) if site.request.form == "none" else frozenset()
    )


def _choose(site: Site, flags: Mapping[str, str], nodes: int, limit: int | None, notes: list[str]) -> Queue | None:
    """Return the first queue that has what the user named, and allows the job."""
    if not site.queue:
        return None
    named = [queue for queue in site.queue if _is_named(queue, flags)]
    named = [queue for queue in named if not queue.on_request or _is_asked_for(queue, flags)]
    # hbm80g is asked for by name: a queue that has it comes before one that only has gpu.
    named.sort(key=lambda queue: -len(queue.constraint.split("&")) if "constraint" in flags else 0)
    paying = [queue for queue in named if flags.get("account", "").endswith(queue.account_suffix)]
    candidates = paying or named
    if not candidates:
        given = " ".join(f"--{key}={flags[key]}" for key in _CHOICE if key in flags)
        notes.append(f"the file of {site.name} has no queue for {given}: its limits are not checked")
        return None
    gpus = {node.name: node.gpus for node in site.node}
    refusals = [(queue, _refusal(queue, nodes, gpus[queue.node], limit)) for queue in candidates]
    fitting = [queue for queue, refusal in refusals if not refusal]
    if not fitting:
        reasons = "; ".join(f"{queue.name}: {refusal}" for queue, refusal in refusals)
        raise UserError(
            f"{site.name} has no queue for this job: {reasons}. A longer run is requeued at the limit and continues"
        )
    queue = fitting[0]
    chosen = " ".join(f"--{key}={value}" for key in _CHOICE if (value := getattr(queue, key)) and key not in flags)
    if chosen:
        notes.append(f"{chosen}: {site.title}, {queue.name}{f', at most {queue.max_time}' if queue.max_time else ''}")
    return queue


def _is_named(queue: Queue, flags: Mapping[str, str]) -> bool:
    """Return whether the partition, QOS and constraint that the user wrote are those of the queue."""
    if "constraint" in flags and queue.constraint:
        features = set(re.split("[&,]", flags["constraint"]))
        if not features.issuperset(queue.constraint.split("&")):
            return False
    return all(flags[key] == getattr(queue, key) for key in ("partition", "qos") if key in flags)


def _is_asked_for(queue: Queue, flags: Mapping[str, str]) -> bool:
    """Return whether the user wrote what distinguishes the queue: its QOS, or without one its partition."""
    key = "qos" if queue.qos else "partition"
    return key in flags or ("constraint" in flags and bool(queue.constraint))


def _refusal(queue: Queue, nodes: int, gpus: int, limit: int | None) -> str:
    """Return which limit of the queue a job exceeds, or ""."""
    longest = minutes(queue.max_time)
    if longest is not None and limit is not None and limit > longest:
        return f"at most --time={queue.max_time}"
    if nodes < queue.min_nodes:
        return f"at least --nodes={queue.min_nodes}"
    if queue.max_nodes and nodes > queue.max_nodes:
        return f"at most --nodes={queue.max_nodes}"
    if queue.max_gpus and nodes * gpus > queue.max_gpus:
        return f"at most {counted(queue.max_gpus, 'GPU')}, {counted(queue.max_gpus // gpus, 'node')}"
    return ""


def _check_account(site: Site, queue: Queue, account: str) -> None:
    if not account and site.account.required:
        example = f", as in --account={site.account.example}" if site.account.example else ""
        raise UserError(f"{site.title} needs the account that pays for the job: --account=NAME{example}")
    if account and not account.endswith(queue.account_suffix):
        right = account.partition("@")[0] + queue.account_suffix
        raise UserError(f"jobs in {queue.name} are paid by an account that ends with {queue.account_suffix}, but the "
                        f"account is {account}: --account={right}")  # fmt: skip


def _request_gpus(site: Site, node: Node, flags: dict[str, str], nodes: int, notes: list[str]) -> int:
    """Write the request for GPUs in the form of the site; return how many of a node are requested.

    Raises:
        UserError: a node has fewer, or is only given whole.
    """
    own = list(written_for_gpus(flags))
    gpus = gpus_per_node(flags, nodes) if own else node.gpus
    if gpus == 0:
        return 0
    text = " ".join(f"--{name}={flags[name]}" for name in own)
    if gpus > node.gpus:
        raise UserError(f"{text}: a node of {site.title} has {node.gpus} ({node.gpu})")
    if gpus < node.gpus and site.request.whole_nodes:
        raise UserError(
            f"{text}: {site.title} gives and charges whole nodes, with {counted(node.gpus, 'GPU')}: request all"
        )
    if own and own != ["gpus-per-node"]:
        return gpus
    form = site.request.form
    if form == "gpus-per-node":
        flags.setdefault("gpus-per-node", str(gpus))
        return gpus
    written = flags.pop("gpus-per-node", None)
    if form == "gres":
        others = [flags["gres"]] if "gres" in flags else []  # as nvme:100
        flags["gres"] = ",".join([*others, f"{site.request.gres}:{gpus}"])
    elif form == "gpus-per-task":
        flags["gpus-per-task"] = "1"
        flags.setdefault("ntasks-per-node", str(gpus))
    if written:
        instead = {"gres": f"--gres={site.request.gres}:{gpus}", "gpus-per-task": "--gpus-per-task=1"}
        notes.append(f"{instead.get(form, 'no request for GPUs')} in place of --gpus-per-node={written}, as "
                     f"{site.name} has it")  # fmt: skip
    return gpus


def _count(flags: Mapping[str, str], name: str) -> int:
    """Return the value of a flag that is a number, 1 if it is not written."""
    text = flags.get(name, "1")
    if not re.fullmatch("[1-9][0-9]*", text):
        raise UserError(f"--{name}={text}: expected a whole number of at least 1")
    return int(text)


def batch_script(text: str, filled: Filled) -> str:
    """Return a batch script with these flags in place of its own lines ``#SBATCH --name=value`` of the same names.

    A request for GPUs replaces one in another form: with both, Slurm gives a job the GPUs of one, and its steps those
    of the other.
    """
    replaced = set(filled.flags) | filled.not_wanted
    if replaced & set(GPU_FLAGS):
        replaced |= set(GPU_FLAGS)
    lines = text.splitlines(keepends=True)
    own = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    kept = {i: line for i, line in enumerate(lines) if i not in own or _directive(line) not in replaced}
    flags = [f"#SBATCH {shlex.quote(flag)}\n" for flag in as_arguments(filled.flags)]
    before = [line for i, line in kept.items() if i < own[0]]
    return "".join([*before, *flags, *(line for i, line in kept.items() if i >= own[0])])


def _directive(line: str) -> str:
    """Return the name of the flag in a line ``#SBATCH --name=value``."""
    return line.removeprefix("#SBATCH ").strip().removeprefix("--").partition("=")[0]


def as_arguments(flags: Mapping[str, str]) -> Sequence[str]:
    """Return the flags as arguments of sbatch."""
    return [f"--{name}={value}" if value else f"--{name}" for name, value in flags.items()]
