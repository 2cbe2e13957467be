"""This rank's batches, straight from the memory-mapped shards: computed, not remembered.

Global step s is samples [s*G, (s+1)*G) of the run (see ``hpcgpt.order``). Rank r of R takes the r-th
of R equal slices of those, and works through it in micro-batches. So the loader has no state to save,
no worker processes to shield from signals, and any number of ranks that divides the work sees the
same samples in the same global batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcgpt import order
from hpcgpt.shard_reader import Split


@dataclass(frozen=True)
class Windows:
    """The windows of one split, of `context` + 1 tokens each."""

    split: Split
    context: int
    stride: int
    vocab_size: int

    @property
    def count(self) -> int:
        return order.window_count(self.split.tokens, self.context, self.stride)

    def read(self, windows: NDArray[np.int64]) -> Tensor:
        """The tokens of `windows` (B,) as a tensor (B, T+1) of int16 bit patterns; see `widen`.

        Raises:
            ValueError: an id outside of the vocabulary; the message names the shard and the place.
        """
        batch = np.empty((len(windows), self.context + 1), dtype=np.uint16)
        for row, window in enumerate(windows):
            batch[row] = self.split.read(int(window) * self.stride, self.context + 1)
        if int(batch.max()) >= self.vocab_size:
            row, column = map(int, np.argwhere(batch >= self.vocab_size)[0])
            place = self.split.where(int(windows[row]) * self.stride + column)
            raise ValueError(
                f"id {batch[row, column]} is outside of the vocabulary of {self.vocab_size:,} ids ({place}): check "
                "the shards with `python -m data_prep.verify`"
            )
        return torch.from_numpy(batch.view(np.int16))


@dataclass(frozen=True)
class Loader:
    """The training batches of one rank."""

    windows: Windows
    seed: int
    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    def batch(self, step: int, micro_step: int) -> Tensor:
        """Micro-batch `micro_step` of optimizer step `step`, both counted from 0 (B, T+1)."""
        first = step * self.global_batch + self.rank * (self.global_batch // self.world_size)
        first += micro_step * self.micro_batch
        return self.windows.read(order.windows(first, self.micro_batch, self.windows.count, self.seed))


def widen(batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 on `device`, from a batch (B, T+1) of 16-bit patterns.

    The narrow form crosses the bus: 2 bytes a token instead of 16. Torch computes with int16 but hardly
    with uint16, so the sign bit is masked away after widening.
    """
    ids = batch.to(device).to(torch.int64) & 0xFFFF
    return ids[:, :-1], ids[:, 1:]
