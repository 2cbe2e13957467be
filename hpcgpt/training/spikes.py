"""Detects a loss or gradient that is not finite, and a loss spike.

Both are detected from numbers that are the same on every rank, so all ranks detect the same at the same step without
communication. Only the names of the batches that caused it are gathered.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hpcgpt.config.options import Spike
from hpcgpt.data.loader import Loader
from hpcgpt.distributed.collectives import merge_on_all
from hpcgpt.distributed.world import Ranks

MOST_NAMED = 8  # micro-batches in a message
LONGEST_SKIP = 10  # steps in a row with a loss or gradient that is not finite: training has diverged


def locate_nonfinite(micro_losses: Sequence[Tensor], number: int, loader: Loader, ranks: Ranks) -> str:
    """Describe the micro-batches that made a step's loss not finite. A collective.

    `micro_losses`: of this rank's micro-batches; `number`: of the global batch.
    """

    def local_batches() -> tuple[list[str], int]:
        bad = [micro_step for micro_step, loss in enumerate(micro_losses) if not math.isfinite(float(loss))]
        spans = [loader.samples(number, micro_step) for micro_step in bad]
        named = [f"rank {ranks.world.rank}, samples {span[0]:,} to {span[-1]:,}" for span in spans]
        return named[:MOST_NAMED], len(named)

    def merge(lower: tuple[list[str], int], higher: tuple[list[str], int]) -> tuple[list[str], int]:
        return (lower[0] + higher[0])[:MOST_NAMED], lower[1] + higher[1]

    named, count = merge_on_all(ranks, local_batches, merge)
    if count:
        return "; ".join(named) + (f"; and {count - len(named):,} more" if count > len(named) else "")
    first, after = number * loader.global_batch, (number + 1) * loader.global_batch
    return f"every micro-batch's loss is a finite number, and a gradient is not: samples {first:,} to {after - 1:,}"


@dataclass(frozen=True)
class StepVerdict:
    """The result of checking a step: `message` if there is one to report, `fatal`: its continuation if the run ends."""

    message: str = ""
    fatal: str = ""
    spike: bool = False


class SpikeDetector:
    """Checks each step in turn. Every rank has one, and all get the same results."""

    def __init__(self, settings: Spike) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._bad_steps = 0  # in a row

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace the history by the steps of these rows of metrics.jsonl, as if this detector had checked them.

        So its results do not depend on interruptions.
        """
        self._recent.clear()
        self._bad_steps = 0
        for row in rows:
            loss, norm = row["train/loss"], row["train/grad_norm"]
            self._record(math.nan if loss is None else loss, math.nan if norm is None else norm)

    def check(self, step: int, loss: float, norm: float, skipped: bool, locate: Callable[[], str]) -> StepVerdict:
        """Check a step, counted from 1, by its loss and gradient norm. `skipped`: the weights were not changed.

        If one of them is not finite, all ranks call `locate` for a message that names the batches that caused it.
        """
        spike = self._record(loss, norm)
        if self._bad_steps:
            message = f"step {step:,}: the loss is {loss} and the gradient's norm {norm} ({locate()})"
            return self._not_finite(message, skipped)
        if spike:
            usual = statistics.median(self._recent)
            return StepVerdict(f"step {step:,}: the loss is {loss:.4f}, and {usual:.4f} was usual", spike=True)
        return StepVerdict()

    def _record(self, loss: float, norm: float) -> bool:
        """Add a step to the history, unless its loss is a spike or not finite; return whether it is a spike."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._bad_steps += 1
            return False
        self._bad_steps = 0
        if not self._settings.factor:
            return False
        spike = is_spike(loss, self._recent, self._settings.factor, self._settings.window)
        if not spike:
            self._recent.append(loss)
        return spike

    def _not_finite(self, message: str, skipped: bool) -> StepVerdict:
        """Return whether the run continues after a loss or gradient that is not finite."""
        if not skipped:
            return StepVerdict(
                message,
                ": training has diverged, and the checkpoints before are whole; try a lower optim.lr under another "
                "--run.name, or train.on_nonfinite skip",
            )
        if self._bad_steps >= LONGEST_SKIP:
            return StepVerdict(message, f", and so it was in {self._bad_steps} steps in a row: training has diverged")
        return StepVerdict(f"{message}: skipped, weights and optimizer are as they were")


def is_spike(loss: float, recent: Sequence[float], factor: float, window: int) -> bool:
    """Return whether `loss` is more than `factor` times the median of the last `window` losses.

    There are no spikes until half of the window is filled. Losses are in nats; near 3 they vary by some hundredths, so
    a factor of 1.5 is large.
    """
    return len(recent) >= max(1, window // 2) and loss > factor * statistics.median(recent)
