"""What Slurm offers: partitions with their limits, and the nodes in them. From one call of sinfo.

    sinfo --all --exact --noconvert --format=%P|%a|%l|%s|%D|%c|%m|%f|%G|%T    sinfo(1); the same in Slurm 22.05 to 24.11

No torch in here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcgpt.output.counted import counted
from hpcgpt.slurm import scontrol

_FORMAT = "%P|%a|%l|%s|%D|%c|%m|%f|%G|%T"


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike. `cpus` counts as Slurm does: hardware threads, where they are enabled.

    `gpus` is the number of GPUs of a node and `gpu_types` the names that its gres have ("" if it has no name).
    """

    count: int
    cpus: int
    memory_mb: int
    features: frozenset[str]
    gpus: int
    gpu_types: tuple[str, ...]
    usable: bool

    @property
    def gpu_text(self) -> str:
        names = " ".join(name for name in self.gpu_types if name)
        return f"{self.gpus} x {names}" if names else counted(self.gpus, "GPU")


@dataclass(frozen=True)
class Partition:
    """A partition. `max_minutes` and `max_nodes` are None without a limit; a job has `min_nodes` at least."""

    name: str
    is_default: bool
    is_up: bool
    max_minutes: int | None
    max_nodes: int | None
    min_nodes: int
    kinds: tuple[NodeKind, ...]

    def kinds_with(self, constraint: str) -> tuple[NodeKind, ...]:
        """Return the kinds with these features; all, where `constraint` is more than features joined by ``&``."""
        if not re.fullmatch(r"[\w.-]+(&[\w.-]+)*", constraint):
            return self.kinds
        return tuple(kind for kind in self.kinds if kind.features.issuperset(constraint.split("&")))


def ask() -> tuple[list[Partition], str]:
    """Ask Slurm for its partitions, the hidden ones, too; return also why there is no answer, "" if there is one."""
    done = scontrol.run("sinfo", "--all", "--noheader", "--exact", "--noconvert", f"--format={_FORMAT}")
    found = parse(done.stdout)
    if found:
        return found, ""
    return [], (done.stderr.strip() or "sinfo lists no partition").splitlines()[-1]


def parse(text: str) -> list[Partition]:
    """Parse the output of sinfo; partitions in the order of the output."""
    rows = [line.split("|") for line in text.splitlines()]
    by_name: dict[str, list[Sequence[str]]] = {}
    for row in rows:
        if len(row) == len(_FORMAT.split("|")):
            by_name.setdefault(row[0], []).append(row)
    return [
        Partition(
            name.rstrip("*"),
            is_default=name.endswith("*"),
            is_up=found[0][1] == "up",
            max_minutes=minutes(found[0][2]),
            max_nodes=_last_number(found[0][3]),
            min_nodes=int(least[0]) if (least := re.match(r"\d+", found[0][3])) else 1,
            kinds=tuple(_kind(row) for row in found if row[4] != "0"),
        )
        for name, found in by_name.items()
    ]


def minutes(text: str) -> int | None:
    """Convert a duration as Slurm writes it to minutes, rounded up; None if it is none, as ``infinite``.

    M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; see sbatch(1), --time.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return None
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, mins, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, mins, secs = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)


def gpus_in(gres: str) -> list[tuple[str, int]]:
    """Return the types ("" without one) and numbers of the GPUs in a list of gres or TRES; [] if it has none.

    As flags have it and as Slurm shows it: ``gpu``, ``gpu:a100:4(S:0-1)``, ``nvme:1,gres/gpu:2``, ``gres/gpu:a100=2``.
    """
    found = []
    for part in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = re.split("[:/=]", part.strip().removeprefix("gres/").removeprefix("gres:"))
        if words[0] == "gpu":
            count = int(words.pop()) if words[-1].isdigit() else 1
            found.append((":".join(words[1:]), count))
    return found


def _kind(row: Sequence[str]) -> NodeKind:
    gpus = gpus_in(row[8])
    return NodeKind(
        count=int(row[4]),
        cpus=_last_number(row[5]) or 1,
        memory_mb=_last_number(row[6]) or 0,
        features=frozenset(row[7].split(",")) - {"(null)", ""},
        gpus=sum(int(count) for _, count in gpus),
        gpu_types=tuple(name for name, _ in gpus),
        usable=scontrol.is_usable(row[9]),
    )


def _last_number(text: str) -> int | None:
    """Return 8 of "1-8" and of "8+"; None of "1-infinite"."""
    found = re.search(r"(\d+)\+?$", text)
    return int(found[1]) if found else None
