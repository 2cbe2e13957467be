"""Blame: which rank is it that all the others wait for?

In data-parallel training every rank's step takes equally long, since all wait for the slowest in the all-reduce. What
tells them apart is the time before that: each rank's own reading of data, its micro-steps without
synchronisation, and the forward pass of the last micro-step. ``LocalTime`` measures it, at the cost of
reading a clock twice a step. Every `blame.every` steps all ranks gather their medians, and `judge` compares
them: a rank that took more than `blame.factor` times as long as usual, twice in a row, is a straggler.

The usual time is the lower median of all ranks: where half of them are slow (one node of two), the slow
half is not usual. Medians over many steps, and twice in a row, since one hiccup is no straggler.

Torch is imported where it is used.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcgpt.distributed.device_clock import DeviceClock

if TYPE_CHECKING:
    import torch

    from hpcgpt.config import options
    from hpcgpt.distributed.world import Ranks

PATIENCE = 2


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow: seconds of its own work a step, and those of a usual rank; `factor` is their ratio."""

    rank: int
    host: str
    local_s: float
    usual_s: float

    @property
    def factor(self) -> float:
        return self.local_s / self.usual_s

    @property
    def words(self) -> str:
        return (
            f"rank {self.rank} on {self.host} is slow, and all wait for it: its own work takes "
            f"{1000 * self.local_s:,.1f} ms a step, {self.factor:.1f} times the usual {1000 * self.usual_s:,.1f} ms"
        )


def judge(strikes: Sequence[int], local_s: Sequence[float], factor: float) -> tuple[list[int], list[int]]:
    """How often in a row each rank has been slow by now, and the ranks to name.

    `strikes` are those before, `local_s` the new times by rank; a time of 0 is not known, and neither slow nor
    usual. A rank is named once, when its strikes reach `PATIENCE`, and again only after it was fast in between.
    """
    usual_s = usual(local_s)
    now = [before + 1 if own > factor * usual_s else 0 for before, own in zip(strikes, local_s, strict=True)]
    return now, [rank for rank, count in enumerate(now) if count == PATIENCE]


def usual(local_s: Sequence[float]) -> float:
    """The lower median of the times that are known."""
    return statistics.median_low([own for own in local_s if own > 0] or [0.0])


class StragglerDetector:
    """Gathers local times every so many steps. Each rank has one, and comes to the same verdict."""

    def __init__(self, settings: options.Blame, ranks: Ranks) -> None:
        """A collective."""
        self._settings, self._ranks = settings, ranks
        self._strikes = [0] * ranks.world.size
        # None: nothing is measured, which is for one rank alone too.
        self.local = LocalTime(ranks.device) if settings.every and ranks.cpu_group is not None else None
        self._hosts: list[str] = []
        if self.local:
            from hpcgpt.distributed.collectives import gather_from_all

            self._hosts = gather_from_all(ranks, socket.gethostname)

    def after(self, step: int) -> list[Straggler]:
        """The stragglers to name after this step. A collective: every rank calls it after each step."""
        if self.local is None or step % self._settings.every:
            return []
        local_s = self._gather(self.local.take())
        self._strikes, named = judge(self._strikes, local_s, self._settings.factor)
        return [Straggler(rank, self._hosts[rank], local_s[rank], usual(local_s)) for rank in named]

    def _gather(self, own: float) -> list[float]:
        import torch
        import torch.distributed as dist

        mine = torch.tensor([own], dtype=torch.float64)
        all_of_them = [torch.zeros_like(mine) for _ in range(self._ranks.world.size)]
        dist.all_gather(all_of_them, mine, group=self._ranks.cpu_group)
        return [float(one) for one in all_of_them]


class LocalTime:
    """A stopwatch for a rank's own part of each step. On a GPU its stops are read once the device has passed them."""

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._started: Any = None
        self._spans: list[tuple[Any, Any]] = []

    def start(self) -> None:
        self._started = self._clock.mark()

    def stop(self) -> None:
        self._spans.append((self._started, self._clock.mark()))

    def take(self) -> float:
        """Median seconds since the last time it was asked; 0 if there were none."""
        spans, self._spans = self._spans, []
        found = [self._clock.between_s(start, stop) for start, stop in spans if self._clock.passed(stop)]
        return float(statistics.median(found or [0.0]))
