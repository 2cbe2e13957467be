"""Steps that went wrong: a loss or a gradient that is no finite number, and a loss that leaps.

Both are judged by numbers that are the same on every rank, so all ranks come to the same verdict at the same step,
and nobody has to ask the others. Only whose batch it was must be gathered.
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
from hpcgpt.distributed.collectives import gather_from_all
from hpcgpt.distributed.world import Ranks

LONGEST_SKIP = 10  # steps in a row whose gradients are not finite: it will not get better by itself


def locate_nonfinite(micro_losses: Sequence[Tensor], number: int, loader: Loader, ranks: Ranks) -> str:
    """Whose batches made a step's loss no finite number, in words. A collective.

    `own`: the losses of this rank's micro-batches, `number`: of the global batch.
    """

    def mine() -> list[str]:
        bad = [micro_step for micro_step, loss in enumerate(micro_losses) if not math.isfinite(float(loss))]
        spans = [loader.samples(number, micro_step) for micro_step in bad]
        return [f"rank {ranks.world.rank}, samples {span[0]:,} to {span[-1]:,}" for span in spans]

    found = [words for of_rank in gather_from_all(ranks, mine) for words in of_rank]
    if found:
        return "; ".join(found[:8]) + (f"; and {len(found) - 8:,} more" if len(found) > 8 else "")
    first, after = number * loader.global_batch, (number + 1) * loader.global_batch
    return f"every micro-batch's loss is a finite number, and a gradient is not: samples {first:,} to {after - 1:,}"


@dataclass(frozen=True)
class StepVerdict:
    """On a step: `words` where there is something to tell, `fatal` how they go on if it ends the run, `spike`."""

    message: str = ""
    fatal: str = ""
    spike: bool = False


class SpikeDetector:
    """Looks at each step in turn. Every rank has one, and comes to the same verdicts."""

    def __init__(self, settings: Spike) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._bad_steps = 0  # in a row

    def replay(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The steps until now, from rows of metrics.jsonl; what was known before is forgotten.

        As if this judge had seen those steps itself, since a verdict must not depend on interruptions.
        """
        self._recent.clear()
        self._bad_steps = 0
        for row in rows:
            loss, norm = row["train/loss"], row["train/grad_norm"]
            self._leaps(math.nan if loss is None else loss, math.nan if norm is None else norm)

    def check(self, step: int, loss: float, norm: float, skipped: bool, whose: Callable[[], str]) -> StepVerdict:
        """On a step, counted from 1, with this loss and gradient norm; was it `skipped`?

        `whose` is asked, by all ranks, for the batches that made them no finite numbers.
        """
        leaps = self._leaps(loss, norm)
        if self._bad_steps:
            words = f"step {step:,}: the loss is {loss} and the gradient's norm {norm} ({whose()})"
            return self._not_finite(words, skipped)
        if leaps:
            usual = statistics.median(self._recent)
            return StepVerdict(f"step {step:,}: the loss is {loss:.4f}, and {usual:.4f} was usual", spike=True)
        return StepVerdict()

    def _leaps(self, loss: float, norm: float) -> bool:
        """Note a step; does its loss leap? If it does, or is no finite number, it is none of the usual ones."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._bad_steps += 1
            return False
        self._bad_steps = 0
        if not self._settings.factor:
            return False
        leaps = is_spike(loss, self._recent, self._settings.factor, self._settings.window)
        if not leaps:
            self._recent.append(loss)
        return leaps

    def _not_finite(self, words: str, skipped: bool) -> StepVerdict:
        if not skipped:
            return StepVerdict(
                words,
                ": training has diverged, and the checkpoints before are whole; try a lower optim.lr under another "
                "--run.name, or train.on_nonfinite skip",
            )
        if self._bad_steps >= LONGEST_SKIP:
            return StepVerdict(words, f", and so it was in {self._bad_steps} steps in a row: training has diverged")
        return StepVerdict(f"{words}: skipped, weights and optimizer are as they were")


def is_spike(loss: float, recent: Sequence[float], factor: float, window: int) -> bool:
    """Is `loss` more than `factor` times the usual one, the median of the last `window`?

    Nothing is usual before half of the window is there. In nats, where a factor of 1.5 is a leap: losses near 3
    scatter by some hundredths.
    """
    return len(recent) >= max(1, window // 2) and loss > factor * statistics.median(recent)
