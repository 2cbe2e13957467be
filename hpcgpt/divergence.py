"""Steps that went wrong: a loss or a gradient that is no finite number, and a loss that leaps.

Both are judged by numbers that are the same on every rank, so all ranks come to the same verdict at the same step,
and nobody has to ask the others. Only whose batch it was must be gathered.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from torch import Tensor

from hpcgpt.loader import Loader
from hpcgpt.together import on_all
from hpcgpt.world import Ranks

LONGEST_SKIP = 10  # steps in a row whose gradients are not finite: it will not get better by itself


def blame(own: Sequence[Tensor], number: int, loader: Loader, ranks: Ranks) -> str:
    """Whose batches made a step's loss no finite number, in words. A collective.

    `own`: the losses of this rank's micro-batches, `number`: of the global batch.
    """

    def mine() -> list[str]:
        bad = [micro_step for micro_step, loss in enumerate(own) if not math.isfinite(float(loss))]
        spans = [loader.samples(number, micro_step) for micro_step in bad]
        return [f"rank {ranks.world.rank}, samples {span[0]:,} to {span[-1]:,}" for span in spans]

    found = [words for of_rank in on_all(ranks, mine) for words in of_rank]
    if found:
        return "; ".join(found[:8]) + (f"; and {len(found) - 8:,} more" if len(found) > 8 else "")
    first, after = number * loader.global_batch, (number + 1) * loader.global_batch
    return f"every micro-batch's loss is a finite number, and a gradient is not: samples {first:,} to {after - 1:,}"


def is_spike(loss: float, recent: Sequence[float], factor: float, window: int) -> bool:
    """Is `loss` more than `factor` times the usual one, the median of the last `window`?

    Nothing is usual before half of the window is there. In nats, where a factor of 1.5 is a leap: losses near 3
    scatter by some hundredths.
    """
    return len(recent) >= max(1, window // 2) and loss > factor * statistics.median(recent)
