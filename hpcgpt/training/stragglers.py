"""Detects stragglers: ranks that all others wait for.

In data-parallel training every rank's step takes equally long, since all wait for the slowest in the all-reduce. Ranks
differ in the time before that, the local time: reading data, micro-steps without synchronization, and the forward pass
of the last micro-step. ``LocalTime`` measures it by reading a clock twice a step. Every `blame.every` steps the medians
of all ranks are gathered, and `count_strikes` compares them: a rank that took more than `blame.factor` times the usual
time, twice in a row, is a straggler. Medians over many steps, and twice in a row, because a single delay is harmless.

The usual time is the lower median of all ranks, so that it is that of the fast half if half of the ranks are slow (one
node of two).

Torch is imported where it is used.
"""

from __future__ import annotations

import math
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from hpcgpt.distributed import node_figures
from hpcgpt.distributed.device_clock import DeviceClock
from hpcgpt.distributed.node_figures import NodeFigures

if TYPE_CHECKING:
    import torch

    from hpcgpt.config import operation
    from hpcgpt.distributed.world import Ranks

PATIENCE = 2  # strikes
RECORD_EVERY_S, MOST_RANKS, DIGITS = 30.0, 128, 3  # of ranks.jsonl

T = TypeVar("T")


@dataclass(frozen=True)
class Straggler:
    """A slow rank: its local seconds a step, and the usual ones; `factor` is their ratio."""

    rank: int
    host: str
    local_s: float
    usual_s: float

    @property
    def factor(self) -> float:
        return self.local_s / self.usual_s

    @property
    def message(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow, and all wait for it: its own work takes "
            f"{1000 * self.local_s:,.1f} ms a step, {self.factor:.1f} times the usual {1000 * self.usual_s:,.1f} ms"
        )


@dataclass(frozen=True)
class Gathered:
    """The local seconds a step of all ranks, by rank, and the figures of each node (hpcgpt.distributed.node_figures)
    that are known, by name, with its `host`.
    """

    local_s: list[float]
    nodes: list[dict[str, Any]]

    @property
    def line(self) -> dict[str, Any]:
        """Return these figures for ranks.jsonl, with DIGITS significant digits: no curve shows more."""
        nodes = [
            {key: value if key == "host" else _rounded(value) for key, value in node.items()} for node in self.nodes
        ]
        return {"local_s": [_rounded(time_s) for time_s in self.local_s], "nodes": nodes}


def record_every_s(ranks: int) -> float:
    """Return the least seconds between two lines of ranks.jsonl.

    A line has figures of each rank and node. So above MOST_RANKS of them the file grows as fast as with MOST_RANKS:
    with four ranks a node by 0.5 GB a month.
    """
    return RECORD_EVERY_S * max(1.0, ranks / MOST_RANKS)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def count_strikes(strikes: Sequence[int], local_s: Sequence[float], factor: float) -> tuple[list[int], list[int]]:
    """Return how often in a row each rank has been slow, and the ranks to report now.

    `strikes` are those so far, `local_s` the new times by rank; 0: not known, neither slow nor usual. A rank is
    reported when its strikes reach `PATIENCE`, and again only after it was fast in between.
    """
    usual_s = usual(local_s)
    counts = [before + 1 if time_s > factor * usual_s else 0 for before, time_s in zip(strikes, local_s, strict=True)]
    return counts, [rank for rank, count in enumerate(counts) if count == PATIENCE]


def usual(local_s: Sequence[float]) -> float:
    """Return the lower median of the times that are known; 0 if none is."""
    return statistics.median_low([time_s for time_s in local_s if time_s > 0] or [0.0])


class StragglerDetector:
    """Gathers local times on rank 0, and compares them there. Each rank has one."""

    def __init__(self, settings: operation.Blame, ranks: Ranks) -> None:
        """Gather the names of the hosts. A collective."""
        self._settings, self._ranks = settings, ranks
        self._strikes = [0] * ranks.world.size
        # None if nothing is measured, as with a single rank.
        self.local = LocalTime(ranks.device) if settings.every and ranks.cpu_group is not None else None
        self._hosts: list[str] = []
        self._node = NodeFigures() if self.local and ranks.world.local_rank == 0 else None
        self.gathered: Gathered | None = None  # what the last call of `after` has gathered, on rank 0
        if self.local:
            self._hosts = self._gather(socket.gethostname())

    def after(self, step: int) -> list[Straggler]:
        """Return the stragglers to report after this step, on rank 0; [] on others. A collective, for each step."""
        self.gathered = None
        if self.local is None or step % self._settings.every:
            return []
        of_node = self._node.newest() if self._node else node_figures.UNKNOWN
        found = self._gather((self.local.take(), of_node))
        if not found:
            return []
        self.gathered = Gathered([local_s for local_s, _ in found], self._nodes([figures for _, figures in found]))
        local_s = self.gathered.local_s
        self._strikes, slow = count_strikes(self._strikes, local_s, self._settings.factor)
        return [Straggler(rank, self._hosts[rank], local_s[rank], usual(local_s)) for rank in slow]

    def _gather(self, own: T) -> list[T]:
        from hpcgpt.distributed.collectives import gather_to_rank0

        return gather_to_rank0(self._ranks, lambda: own)

    def _nodes(self, figures: Sequence[tuple[float, ...]]) -> list[dict[str, Any]]:
        """Return the figures that are known, with the host of each."""
        nodes = []
        for host, of_rank in zip(self._hosts, figures, strict=True):
            known = {key: value for key, value in zip(node_figures.KEYS, of_rank, strict=True) if math.isfinite(value)}
            if known:
                nodes.append({"host": host, **known})
        return nodes


class LocalTime:
    """Measures the local time of each step. On a GPU, clock marks are read only once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._started: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._started = self._clock.mark()

    def stop(self) -> None:
        self._spans.append((self._started, self._clock.mark()))

    def take(self) -> float:
        """Return the median seconds of the steps since the last call; 0 if there were none."""
        spans, self._spans = self._spans, []
        times_s = [self._clock.between_s(start, stop) for start, stop in spans if self._clock.passed(stop)]
        return float(statistics.median(times_s or [0.0]))
