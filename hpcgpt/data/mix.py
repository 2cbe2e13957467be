"""Mixing data sets: which data set sample number i of a run comes from, a pure function of (seed, i) without state.

The samples of a run are divided into blocks of M = 65,536. In every block data set d has the same whole number q_d of
samples, its weight's share of M by largest remainder: proportions are exact after each block, and off by less than a
block before its end. Which samples of a block these are is a permutation of the block with a key of its own
(``hpcgpt.data.sample_order.permute``):

    p      = permute(i mod M, M, (seed, "mix", i div M))
    set    = the d with  start_d <= p < start_d + q_d,   where start_d = q_0 + ... + q_(d-1)
    local  = (i div M) * q_d + p - start_d, the number of the sample in data set d
    window = the window of that sample, in data set d's own epochs (``hpcgpt.data.sample_order``, key (seed, epoch, d))

So the samples of each data set are numbered without a gap. Each data set has its own epochs, in which every window
occurs once, and the properties of ``hpcgpt.data.sample_order`` hold for the mix: one integer resumes it, and any number
of ranks sees the same samples in the same global batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hpcgpt.data import sample_order

MIX_BLOCK = 65_536


def divide_block(weights: Sequence[float]) -> list[int]:
    """Return the samples of each data set in a block, which add up to MIX_BLOCK. Weights may add up to anything.

    Computed in fractions, so that every machine gets the same result; of equal remainders the first is rounded up. A
    weight that is too small for one sample gets 0.
    """
    total = sum(map(Fraction, weights))
    exact = [MIX_BLOCK * Fraction(weight) / total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda d: counts[d] - exact[d])
    for d in by_remainder[: MIX_BLOCK - sum(counts)]:
        counts[d] += 1
    return counts


def draw(
    samples: NDArray[np.int64], samples_per_block: Sequence[int], window_counts: Sequence[int], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the data set of each of `samples` of a run (n,), and the window in it (n,).

    `window_counts` are the windows of each data set. A single data set has the order of ``hpcgpt.data.sample_order``.
    """
    if len(samples_per_block) == 1:
        return np.zeros(len(samples), dtype=np.int64), sample_order.windows(samples, window_counts[0], seed)
    ends = np.cumsum(samples_per_block)
    starts = ends - samples_per_block
    blocks, within = np.divmod(samples, MIX_BLOCK)
    permuted = np.empty_like(samples)
    for block, selection in sample_order.groups(blocks):
        permuted[selection] = sample_order.permute(within[selection], MIX_BLOCK, (seed, "mix", block))
    sets = np.searchsorted(ends, permuted, side="right")
    local = blocks * np.asarray(samples_per_block)[sets] + permuted - starts[sets]
    windows = np.empty_like(samples)
    for d, selection in sample_order.groups(sets):
        windows[selection] = sample_order.windows(local[selection], window_counts[d], seed, d)
    return sets, windows
