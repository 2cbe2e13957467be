"""The KV cache: keys and values of the tokens that a model has processed, so that each further token costs one token's
pass.

A cache belongs to one model and one text, or a batch of texts of equal length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcgpt.config.options import Model


class LayerKVCache:
    """Keys and values of one block, (B, K, S, D) each: K key-value heads, S tokens so far, D head size."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of T more tokens (B, K, T, D); return those of all S."""
        if self._keys is None or self._values is None:
            # Allocated once: concatenation would copy the whole text for each token.
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        end = self._length + keys.shape[2]
        self._keys[:, :, self._length : end] = keys
        self._values[:, :, self._length : end] = values
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class KVCache:
    """The ids (B, S) that a model has processed, and the cache of each block."""

    def __init__(self, config: Model, tokens: int) -> None:
        """Make an empty cache with room for `tokens` tokens, but for no more than block_size."""
        self.layers = [LayerKVCache(min(config.block_size, tokens)) for _ in range(config.n_layer)]
        self.ids: Tensor | None = None

    def extend(self, ids: Tensor) -> Tensor:
        """Append `ids` (B, T); return all of them (B, S)."""
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        return self.ids
