"""Which data set is sample number i of a mixed run from: a pure function of (seed, i), with no state.

The samples of a run are cut into blocks of M = 65,536. In every block data set d has the same whole number
q_d of places, its weight's share of M by largest remainder, so that the proportions are exact after each
block and off by less than a block before its end. Which places those are is a permutation of the block, of
a key of its own (``hpcgpt.data.sample_order.permute``):

    p      = permute(i mod M, M, (seed, "mix", i div M))
    set    = the d with  start_d <= p < start_d + q_d,   where start_d = q_0 + ... + q_(d-1)
    its    = sample number  (i div M) * q_d + p - start_d  of data set d
    window = the window of that sample, in data set d's own epochs (``hpcgpt.data.sample_order``, key (seed, epoch, d))

So the samples of each data set are numbered without a gap, it goes through its own epochs, each of its
windows once an epoch, and all that ``hpcgpt.data.sample_order`` promises holds for the mix: one integer resumes it, and
any number of ranks sees the same samples in the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hpcgpt.data import sample_order

BLOCK = 65_536


def quotas(weights: Sequence[float]) -> list[int]:
    """Places of each data set in a block; they add up to BLOCK. The weights need not add up to anything.

    Exact, so that every machine finds the same ones; of equal remainders the first is served first. A weight
    that is too small for one place gets 0.
    """
    total = sum(map(Fraction, weights))
    exact = [BLOCK * Fraction(weight) / total for weight in weights]
    floors = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda d: floors[d] - exact[d])
    for d in by_remainder[: BLOCK - sum(floors)]:
        floors[d] += 1
    return floors


def draw(
    samples: NDArray[np.int64], quotas: Sequence[int], totals: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The data sets (n,) of `samples` of a run (n,), and the windows in them (n,).

    `totals` are the windows an epoch of each data set. One that is alone has the order of ``hpcgpt.data.sample_order``.
    """
    if len(quotas) == 1:
        return np.zeros(len(samples), dtype=np.int64), sample_order.windows(samples, totals[0], seed)
    ends = np.cumsum(quotas)
    starts = ends - quotas
    blocks, within = np.divmod(samples, BLOCK)
    places = np.empty_like(samples)
    for block, chosen in sample_order.groups(blocks):
        places[chosen] = sample_order.permute(within[chosen], BLOCK, (seed, "mix", block))
    sets = np.searchsorted(ends, places, side="right")
    local = blocks * np.asarray(quotas)[sets] + places - starts[sets]
    windows = np.empty_like(samples)
    for d, chosen in sample_order.groups(sets):
        windows[chosen] = sample_order.windows(local[chosen], totals[d], seed, d)
    return sets, windows
