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

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # the Luby-Rackoff bound needs 4; small domains mix visibly worse below 6


def window_count(tokens: int, context: int, stride: int) -> int:
    """Windows of `context` + 1 tokens, `stride` apart, in a stream of `tokens` tokens."""
    return max(0, (tokens - context - 1) // stride + 1)


def windows(samples: NDArray[np.int64], total: int, seed: int, *more: int) -> NDArray[np.int64]:
    """Windows of `samples` of a run (n,), as indices (n,).

    `total` is the number of windows an epoch; `more` goes into the key. Raises ValueError if there are none.
    """
    if total < 1:
        raise ValueError("an epoch without windows has no order")
    epochs, places = np.divmod(samples, total)
    out = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = permute(places[chosen], total, (seed, int(epoch), *more))
    return out


def permute(places: NDArray[np.int64], total: int, key: tuple[int | str, ...]) -> NDArray[np.int64]:
    """The images of `places` under a permutation of 0 ... total - 1 that `key` chooses.

    Any `total` up to 2**62. Equal arguments give equal results on every machine.
    """
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    out = _feistel(places.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(out >= total)
    while outside.size:
        out[outside] = _feistel(out[outside], half_bits, keys)
        outside = outside[out[outside] >= total]
    return out.astype(np.int64)


def _round_keys(key: tuple[int | str, ...]) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS, person=b"hpcgpt order").digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(x: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
