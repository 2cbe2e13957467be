"""The KV cache: what attention keeps of the tokens that a model has read, so that the next one costs one token.

A cache belongs to one text (or a batch of equally long ones) and one model. It holds block_size tokens at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpcgpt.config.options import Model


class Memory:
    """Keys and values of one block, (B, K, S, D) each: K key-value heads, S tokens so far, D head size."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._length = capacity, 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of T more tokens (B, K, T, D); returns those of all S."""
        if self._keys is None or self._values is None:
            # All of it at once: to join tensors would copy the whole text for each token.
            shape = (*keys.shape[:2], self._capacity, keys.shape[3])
            self._keys, self._values = keys.new_empty(shape), values.new_empty(shape)
        end = self._length + keys.shape[2]
        self._keys[:, :, self._length : end] = keys
        self._values[:, :, self._length : end] = values
        self._length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Cache:
    """A text that a model has read: its ids (B, S), and each block's memory of it."""

    def __init__(self, config: Model) -> None:
        self.blocks = [Memory(config.block_size) for _ in range(config.n_layer)]
        self.ids: Tensor | None = None

    def extend(self, ids: Tensor) -> Tensor:
        """Read on: `ids` (B, T) behind those before; returns all of them (B, S)."""
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        return self.ids
