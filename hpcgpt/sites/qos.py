"""The QOS of this Slurm and their limits: from sacctmgr, or, where users may not call it, from the controller.

    sacctmgr --noheader --parsable2 show qos format=Name,Flags,...     sacctmgr(1), "SPECIFICATIONS FOR QOS"
    scontrol show assoc_mgr flags=qos                                  scontrol(1); from its memory: those of a user or
                                                                       an account only once they had a job in the QOS

Without accounting there are no QOS. No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.slurm import scontrol
from hpcgpt.slurm.partitions import minutes
from hpcgpt.slurm.request import Request

_COLUMNS = ("Name", "Flags", "MaxWall", "MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MaxJobsPU", "MaxSubmitPU",
            "GraceTime", "PreemptMode")  # fmt: skip
# The same in `scontrol show assoc_mgr`. A limit is there as 8(3), with what is used of it, or N(3) without a limit.
_IN_MEMORY = {"MaxWall": "MaxWallPJ", "MaxTRES": "MaxTRESPJ", "MaxTRESPU": "MaxTRESPU", "MaxTRESPA": "MaxTRESPA",
              "GrpTRES": "GrpTRES", "MaxJobsPU": "MaxJobsPU", "MaxSubmitPU": "MaxSubmitJobsPU"}  # fmt: skip
OVER_PARTITION = frozenset(["PartitionTimeLimit", "PartitionMaxNodes", "PartitionMinNodes"])
NOT_READABLE = "not readable here: there is no accounting, or users may not ask"


@dataclass(frozen=True)
class Qos:
    """The limits of a QOS; None and {} without a limit. Resources are by Slurm's name: ``node``, ``gres/gpu``.

    `per_job`, `per_user`, `per_account` and `in_all`: of one job, of all jobs of a user or an account that run at one
    time, and of all jobs in the QOS. `jobs` and `submitted`: of a user, running and with those that wait.
    `flags`: None if they are not readable. With some of them, OVER_PARTITION, its limits replace those of the
    partition; otherwise the stricter one counts.
    """

    max_minutes: int | None = None
    flags: frozenset[str] | None = None
    per_job: Mapping[str, int] = field(default_factory=dict)
    per_user: Mapping[str, int] = field(default_factory=dict)
    per_account: Mapping[str, int] = field(default_factory=dict)
    in_all: Mapping[str, int] = field(default_factory=dict)
    jobs: int | None = None
    submitted: int | None = None
    grace_s: int = 0
    preempt_mode: str = ""

    @property
    def over_partition(self) -> bool:
        """Tell whether its time limit replaces that of the partition."""
        return "PartitionTimeLimit" in (self.flags or ())

    def most(self, resource: str) -> int | None:
        """Return how much of a resource one job can have: a job above any of the limits would wait for ever."""
        found = [limit[resource] for limit in (self.per_job, self.per_user, self.per_account, self.in_all)
                 if resource in limit]  # fmt: skip
        return min(found, default=None)

    def minutes_in(self, partition_minutes: int | None) -> int | None:
        """Return the longest time of a job in a partition with this limit."""
        if self.max_minutes is None or partition_minutes is None:
            return self.max_minutes or partition_minutes
        return self.max_minutes if self.over_partition else min(self.max_minutes, partition_minutes)


def ask() -> dict[str, Qos]:
    """Ask for the QOS; {} where there is no accounting, or users may not ask."""
    done = scontrol.run("sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={','.join(_COLUMNS)}")
    found = parse(done.stdout) if done.returncode == 0 else {}
    if found:
        return found
    done = scontrol.run("scontrol", "show", "assoc_mgr", "flags=qos")
    return parse_memory(done.stdout) if done.returncode == 0 else {}


def over_partition(flags: Mapping[str, str], environment: Mapping[str, str]) -> frozenset[str]:
    """Return which limits of its partition the QOS of a job replaces, of OVER_PARTITION; all, if that is not known."""
    name = _name(flags, environment)
    if not name:
        return frozenset()
    found = ask().get(name)
    return OVER_PARTITION if found is None or found.flags is None else OVER_PARTITION & found.flags


def fit(requested: Request, wanted: Mapping[str, str], environment: Mapping[str, str]) -> Request:
    """Return the request with the time limit of its QOS, where the user's flags, `wanted`, give none; else check it.

    Raises:
        UserError: there is no such QOS, or the job would wait in it for ever.
    """
    flags = requested.flags
    name = _name(flags, environment)
    found = ask() if name else {}
    most, asked = (found[name].max_minutes if name in found else None), minutes(flags.get("time", ""))
    if "time" not in wanted and most is not None and (asked is None or asked > most):
        note = f"--time={most}: the longest that QOS {name} allows, in minutes"
        # The last word on the time: a note on a longer one, that of the partition, no longer holds.
        notes = (*(one for one in requested.notes if not one.startswith("--time=")), note)
        requested = replace(requested, flags=flags | {"time": str(most)}, notes=notes)
    _check(requested.flags, requested.nodes, requested.nodes * requested.gpus_per_node, name, found)
    return requested


def _name(flags: Mapping[str, str], environment: Mapping[str, str]) -> str:
    return flags.get("qos") or environment.get("SBATCH_QOS", "")


def _check(flags: Mapping[str, str], nodes: int, gpus: int, name: str, found: Mapping[str, Qos]) -> None:
    """Refuse a job that exceeds a limit of the QOS `name`, if Slurm shows any; `gpus` in all."""
    if not name or not found:
        return
    if name not in found:
        raise UserError(f"there is no QOS {name}: there are {', '.join(found)}{nearest(name, list(found))}")
    limits = found[name]
    asked = minutes(flags.get("time", ""))
    if asked is not None and limits.max_minutes is not None and asked > limits.max_minutes:
        raise UserError(
            f"--time={flags['time']} is more than QOS {name} allows, {limits.max_minutes} minutes: request "
            f"--time={limits.max_minutes}; a longer run is requeued at the limit and continues"
        )
    for resource, count, what in (("node", nodes, "nodes"), ("gres/gpu", gpus, "GPUs")):
        most = limits.most(resource)
        if most is not None and count > most:
            raise UserError(f"{count} {what}: a job in QOS {name} can have {most}, and would wait for ever")


def parse(text: str) -> dict[str, Qos]:
    """Parse the output of sacctmgr, one line for each QOS."""
    rows = [line.split("|") for line in text.splitlines()]
    return {row[0]: _qos(dict(zip(_COLUMNS, row, strict=True))) for row in rows if len(row) == len(_COLUMNS)}


def parse_memory(text: str) -> dict[str, Qos]:
    """Parse ``scontrol show assoc_mgr flags=qos``: paragraphs that begin with ``QOS=normal(1)``."""
    found = {}
    for part in re.split(r"^(?=QOS=)", text, flags=re.MULTILINE):
        fields = dict(re.findall(r"(\w+)=(\S*)", part))
        if "QOS" in fields:
            row = {column: _without_use(fields.get(name, "")) for column, name in _IN_MEMORY.items()}
            found[fields["QOS"].partition("(")[0]] = _qos(row)
    return found


def _without_use(text: str) -> str:
    """Return ``node=4,gres/gpu=16`` of ``node=4(1),gres/gpu=16(4),cpu=N(8)``."""
    kept = [part.partition("(")[0] for part in text.split(",")]
    return ",".join(part for part in kept if not re.search(r"(^|=)N$", part))


def _qos(row: Mapping[str, str]) -> Qos:
    limit = {column: {name: int(most) for name, most in re.findall(r"([\w/:.-]+)=(\d+)", row.get(column, ""))}
             for column in ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")}  # fmt: skip
    wall = row["MaxWall"]
    flags = frozenset(row["Flags"].split(",")) - {""} if "Flags" in row else None
    return Qos(
        minutes(wall), flags, limit["MaxTRES"], limit["MaxTRESPU"], limit["MaxTRESPA"],
        limit["GrpTRES"], _number(row["MaxJobsPU"]), _number(row["MaxSubmitPU"]),
        _seconds(row.get("GraceTime", "")), row.get("PreemptMode", ""),
    )  # fmt: skip


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _seconds(text: str) -> int:
    """Return the seconds of ``00:05:00``; of a number, the number."""
    if text.isdigit():
        return int(text)
    parts = re.findall(r"\d+", text)
    return sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86_400), strict=False))
