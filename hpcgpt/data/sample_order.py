"""Which tokens are sample number i of a run: a pure function of (seed, i), with no state.

The training split is one long stream of N tokens. Window k is tokens [k*stride, k*stride + T], that
is T inputs and, shifted by one, T targets; there are ``window_count(N, T, stride)`` of them. With
stride = T every target but the fewer than T last ones of the stream is in exactly one window.

An epoch visits every window once, in an order of its own. The order is a permutation that can be
evaluated at any place without the others: a Feistel network on the smallest even number of bits that
holds the window count, whose outputs beyond the count are encrypted again until they fall inside
("cycle walking"; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). So the order takes
no memory at any corpus size, a resume needs one integer, and ranks are disjoint by construction:

    sample i of the run   = window permute(i mod W, W, (seed, i div W)),   W windows an epoch
    global step s         = samples [s*G, (s+1)*G) at global batch G
    rank r of R           = the r-th of R equal slices of those
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # the Luby-Rackoff bound needs 4; small domains mix visibly worse below 6
_TABLE_BITS = 14  # up to 2**28 windows: tables of 1 MB for an epoch, made in less than a millisecond

_Round = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def window_count(tokens: int, context: int, stride: int) -> int:
    """Windows of `context` + 1 tokens, `stride` apart, in a stream of `tokens` tokens."""
    return max(0, (tokens - context - 1) // stride + 1)


def windows(samples: NDArray[np.int64], total: int, seed: int, *more: int) -> NDArray[np.int64]:
    """Windows of `samples` of a run (n,), as indices (n,).

    `total` is the number of windows an epoch; `more` goes into the key. Raises UserError if there are none.
    """
    if total < 1:
        raise ValueError("an epoch without windows has no order")
    epochs, places = np.divmod(samples, total)
    out = np.empty(len(samples), dtype=np.int64)
    for epoch, chosen in groups(epochs):
        out[chosen] = permute(places[chosen], total, (seed, epoch, *more))
    return out


def groups(values: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bool_] | slice]]:
    """Each value that occurs, and where. Most often there is one only, and it takes no sorting to see that."""
    if len(values) and (first := int(values[0])) == values.min() == values.max():
        yield first, slice(None)
        return
    for value in np.unique(values):
        yield int(value), values == value


def permute(places: NDArray[np.int64], total: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """The images of `places` under a permutation of 0 ... total - 1 that `key` chooses.

    Any `total` up to 2**62. Equal arguments give equal results on every machine.
    """
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    rounds = _tables(key, half_bits) if half_bits <= _TABLE_BITS else _computed(key, half_bits)
    out = _feistel(places, half_bits, rounds)
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
    """The rounds as tables, which are several times as fast: a round sees no more than half of the bits."""
    halves = np.arange(1 << half_bits)
    return [scramble(halves).take for scramble in _computed(key, half_bits)]


def _computed(key: tuple[int | str, ...], half_bits: int) -> list[_Round]:
    """The rounds of the network: each a function of half of the bits, (n,) to (n,)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS, person=b"hpcgpt order").digest()
    mask = np.uint64((1 << half_bits) - 1)

    def scrambling(key: np.uint64) -> _Round:
        return lambda half: (_mix(half.astype(np.uint64) + key) & mask).astype(np.int64)

    return [scrambling(key) for key in np.frombuffer(digest, dtype="<u8").astype(np.uint64)]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
