"""What a site file says about a cluster, as frozen dataclasses. hpcgpt.sites.site_file reads them from TOML.

Every table names where its facts are from: ``source`` for the table, ``sources`` for single keys of it. A source is an
entry of ``[sources]``, with its address, the day on which it was read, and its kind::

    official     the centre's own documentation
    copy         a copy or a translation of it
    staff        training material and scripts of the centre's staff
    community    documentation by users of the centre
    third party  a script or notes of one user or project: it has worked for them, the centre does not say it
    default      no fact about a machine, but a choice of this project

A fact without any source is not in the file. A key that is left out is unknown, and nothing is assumed.

No torch in here.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

Kind = Literal["official", "copy", "staff", "community", "third party", "default"]
Form = Literal["gpus-per-node", "gpus-per-task", "gres", "none"]
Runtime = Literal["apptainer", "singularity", "shifter", "pyxis", "container engine"]


@dataclass(frozen=True)
class Source:
    """Where a fact is from. Without a `url`, `about` says what it is: a reader cannot look it up."""

    kind: Kind
    read: datetime.date
    url: str = ""
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The sources of a table of facts: `source` for all keys of it, `sources` for single ones."""

    source: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def named_sources(self, key: str) -> tuple[str, ...]:
        """Return the names of the sources of one key, which is a field, or a name in a field that is a table."""
        return (self.sources[key],) if key in self.sources else self.source


@dataclass(frozen=True, kw_only=True)
class Recognition(Table):
    """How `--site auto` recognizes the cluster: one match is enough, but if Slurm says its ClusterName, and there is a
    pattern for it here, then that alone decides. Patterns are those of a shell.

    `cluster`: ClusterName of Slurm. `variables`: of the environment. `hosts`: host names, as `hostname` prints them.
    """

    cluster: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Account(Table):
    """Whether a job must name its account, and how one looks."""

    required: bool = False
    example: str = ""


@dataclass(frozen=True, kw_only=True)
class Request(Table):
    """How a job requests GPUs, and flags of every job.

    `form` "none": nodes are given whole, with their GPUs. `gres`: the name of the GPUs for the form "gres". `memory`:
    whether a job may request memory. `plugin_flags` are those of a plugin of the site, which other Slurms refuse.
    """

    form: Form
    gres: str = "gpu"
    whole_nodes: bool = False
    memory: bool = True
    flags: Mapping[str, str] = field(default_factory=dict)
    plugin_flags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Node(Table):
    """Nodes that are alike. `gpu` is the name by which the peak is found; `memory_gb` is what jobs can have, in GiB.

    `cpus_per_gpu` counts as Slurm does there: cores, or hardware threads. Half an MI250X is one GPU.
    """

    name: str
    gpu: str
    gpus: int
    cpus_per_gpu: int
    memory_gb: int = 0


@dataclass(frozen=True, kw_only=True)
class Queue(Table):
    """One choice of partition, QOS and constraint, with its limits; 0 and "" are no limit, or not known.

    Of the queues that allow a job, the first one is taken; one that is `on_request` only if the user names it.
    `account_suffix`: what the account ends with.
    """

    name: str
    node: str
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    min_nodes: int = 1
    max_nodes: int = 0
    max_gpus: int = 0
    max_time: str = ""
    on_request: bool = False
    account_suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Activation(Table):
    """Lines of bash that a job needs before Python starts; `in_partition` has those for single partitions."""

    lines: tuple[str, ...] = ()
    in_partition: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Container(Table):
    """The container runtime, flags for it, and lines of bash that make it available."""

    runtime: Runtime
    flags: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Network(Table):
    """Interfaces for the sockets of NCCL and gloo; what is appended to a host name for the fast network."""

    nccl_interface: str = ""
    gloo_interface: str = ""
    master_suffix: str = ""


@dataclass(frozen=True, kw_only=True)
class Environment(Table):
    """Variables for the ranks; a value may contain $NAME and ${NAME}. The user's own value has precedence."""

    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Binding(Table):
    """Variables of srun that bind ranks to cores and GPUs, set if a job uses all GPUs of its nodes, a rank for each.

    `partitions`: only in these; () is in all of them.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Storage(Table):
    """Folders. `purge_days`: after which files that are not used are removed from `scratch`; 0: not known, or never."""

    scratch: str = ""
    node_local: str = ""
    purge_days: int = 0


@dataclass(frozen=True, kw_only=True)
class ComputeNodes(Table):
    """What a compute node may do; None is unknown. `proxy`: the address by which it reaches the internet."""

    internet: bool | None = None
    proxy: str = ""
    sbatch: bool | None = None
    requeue: bool | None = None


@dataclass(frozen=True)
class Site:
    """A cluster. `untried`: hpcgpt has not been run there yet."""

    name: str
    title: str
    untried: bool
    sources: Mapping[str, Source]
    request: Request
    recognize: Recognition = Recognition()
    account: Account = Account()
    node: tuple[Node, ...] = ()
    queue: tuple[Queue, ...] = ()
    activate: Activation = Activation()
    container: Container | None = None
    network: Network = Network()
    environment: Environment = Environment()
    binding: Binding = Binding()
    storage: Storage = Storage()
    compute_nodes: ComputeNodes = ComputeNodes()

    def tables(self) -> Iterator[tuple[str, Table]]:
        """Yield every table of facts that the file has, with its name: ``account``, ``queue regular``."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Table) and value != item.default:
                yield item.name, value
            elif item.name in ("node", "queue"):
                yield from ((f"{item.name} {table.name}", table) for table in value)

    def node_of(self, queue: Queue) -> Node:
        return next(node for node in self.node if node.name == queue.node)


def facts(table: Table) -> Iterator[tuple[str, object]]:
    """Yield the keys of a table that have a value other than the default, and the values; of its maps each entry."""
    for item in fields(table):
        value = getattr(table, item.name)
        if item.name in ("source", "sources", "name") or value in (item.default, {}):
            continue
        if isinstance(value, Mapping):
            yield from value.items()
        else:
            yield item.name, value
