"""The order of samples: which tokens are sample number i of a run, a pure function of (seed, i) without state.

The training split is one long stream of N tokens. Window k is tokens [k*stride, k*stride + T]: T inputs and, shifted by
one, T targets. There are ``window_count(N, T, stride)`` windows. With stride = T every target is in exactly one window,
except for the last ones of the stream, fewer than T.

An epoch visits every window once, in an order of its own. The order is a permutation that can be evaluated at any index
independently: a Feistel network on the smallest even number of bits that holds the window count, whose outputs beyond
the count are encrypted again until they are below it ("cycle walking"; Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). So the order takes no memory for a corpus of any size, a resume needs one integer, and ranks are
disjoint by construction:

    sample i of the run   = window permute(i mod W, W, (seed, i div W)),   W windows in an epoch
    global batch b        = samples [b*G, (b+1)*G) of G samples each
    rank r of R           = the r-th of R equal slices of those
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # the Luby-Rackoff bound needs 4; small domains are visibly less random below 6
_TABLE_BITS = 14  # up to 2**28 windows: tables of 1 MB for an epoch, computed in less than a millisecond

_Round = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def window_count(tokens: int, block_size: int, stride: int) -> int:
    """Count the windows of `block_size` + 1 tokens, `stride` apart, in a stream of `tokens` tokens."""
    return max(0, (tokens - block_size - 1) // stride + 1)


def windows(samples: NDArray[np.int64], total: int, seed: int, *more: int) -> NDArray[np.int64]:
    """Return the windows of `samples` of a run (n,), as indices (n,).

    `total` is the number of windows in an epoch; `more` is added to the key. Raises ValueError if there are none.
    """
    if total < 1:
        raise ValueError("an epoch without windows has no order")
    epochs, indices = np.divmod(samples, total)
    out = np.empty(len(samples), dtype=np.int64)
    for epoch, selection in groups(epochs):
        out[selection] = permute(indices[selection], total, (seed, epoch, *more))
    return out


def groups(values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bool_] | slice]]:
    """Yield each value that occurs, with an index that selects it. Usually there is one, which needs no sorting."""
    if len(values) and (first := int(values[0])) == values.min() == values.max():
        yield first, slice(None)
        return
    for value in np.unique(values):
        yield int(value), values == value


def permute(indices: NDArray[np.int64], total: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """Map `indices` by the permutation of 0 ... total - 1 that `key` selects.

    `total` is at most 2**62. Equal arguments give equal results on every machine.
    """
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    rounds = _tables(key, half_bits) if half_bits <= _TABLE_BITS else _computed(key, half_bits)
    out = _feistel(indices, half_bits, rounds)
    outside = np.flatnonzero(out >= total)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, rounds)
        outside = outside[out[outside] >= total]
    return out


def _feistel(x: NDArray[np.int64], half_bits: int, rounds: list[_Round]) -> NDArray[np.int64]:
    left, right = x >> half_bits, x & ((1 << half_bits) - 1)
    for scramble in rounds:
        left, right = right, left ^ scramble(right)
    return (left << half_bits) | right


@lru_cache(maxsize=64)
def _tables(key: tuple[int | str, ...], half_bits: int) -> list[_Round]:
    """Tabulate the rounds, which is several times faster: the input of a round is only half of the bits."""
    halves = np.arange(1 << half_bits)
    return [scramble(halves).take for scramble in _computed(key, half_bits)]


def _computed(key: tuple[int | str, ...], half_bits: int) -> list[_Round]:
    """Return the rounds of the network: each maps half of the bits, (n,) to (n,)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS, person=b"hpcgpt order").digest()
    mask = np.uint64((1 << half_bits) - 1)

    def scrambling(key: np.uint64) -> _Round:
        return lambda half: (_mix(half.astype(np.uint64) + key) & mask).astype(np.int64)

    return [scrambling(key) for key in np.frombuffer(digest, dtype="<u8").astype(np.uint64)]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every output bit depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
