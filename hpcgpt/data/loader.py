"""The batches of a rank, read from memory-mapped shards. Which samples a batch has is computed, not remembered.

Global batch b is samples [b*G, (b+1)*G) of the run (see ``hpcgpt.data.sample_order``; for several data sets also
``hpcgpt.data.mix``). Rank r of R takes the r-th of R equal slices of those, and divides it into micro-batches. So the
loader has no state to save and no worker processes to protect from signals, and any number of ranks that divides the
global batch sees the same samples in the same global batches.

The positions of up to 16,384 samples of this rank are computed at a time, because a permutation of 64 indices costs
numpy as much as one of thousands. What is cached depends on the configuration alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpcgpt.data import mix, sample_order, shard_reader
from hpcgpt.data.shard_format import Tokens
from hpcgpt.data.shard_reader import Split
from hpcgpt.errors import InputError

_AHEAD = 16_384

# Where windows start (B, 3): number of the data set, number of the shard in it, offset in the shard's tokens.
WindowStarts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The training batches of one rank."""

    mixture: Mixture
    seed: int
    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    def batch(self, number: int, micro_step: int) -> Tensor:
        """Read micro-batch `micro_step` of global batch `number`, both counted from 0: (B, T+1), see `read_windows`.

        Raises:
            InputError: an id outside of the vocabulary, or a shard that cannot be read.
        """
        all_before = number * (self._samples_per_step // self.micro_batch) + micro_step
        block, index = divmod(all_before, self._batches_ahead)
        starts = self._cached_starts(block)[index * self.micro_batch : (index + 1) * self.micro_batch]
        return read_windows(self.mixture.sets, starts)

    def samples(self, number: int, micro_step: int) -> range:
        """Return the numbers of that micro-batch's samples, counted over the whole run: for messages."""
        first = number * self.global_batch + self.rank * self._samples_per_step + micro_step * self.micro_batch
        return range(first, first + self.micro_batch)

    @cached_property
    def _samples_per_step(self) -> int:
        """The samples of this rank in a global batch."""
        return self.global_batch // self.world_size

    @cached_property
    def _batches_ahead(self) -> int:
        # At most about an epoch: each epoch has its own permutation.
        an_epoch = sum(windows.count for windows in self.mixture.sets) // self.world_size
        return max(1, min(_AHEAD, an_epoch) // self.micro_batch)

    @cached_property
    def _cached_starts(self) -> Callable[[int], WindowStarts]:
        return lru_cache(maxsize=2)(self._starts)

    def _starts(self, block: int) -> WindowStarts:
        """Locate the windows of this rank's samples number block * n ... (block + 1) * n - 1: (n, 3)."""
        count = self._batches_ahead * self.micro_batch
        numbers = np.arange(block * count, (block + 1) * count, dtype=np.int64)
        steps, indices = np.divmod(numbers, self._samples_per_step)
        samples = steps * self.global_batch + self.rank * self._samples_per_step + indices
        return self.mixture.locate(samples, self.seed)


@dataclass(frozen=True)
class Mixture:
    """The windows of one or several data sets, and how many samples of each a block of the mix has."""

    sets: Sequence[Windows]
    samples_per_block: Sequence[int] = (mix.MIX_BLOCK,)

    def locate(self, samples: NDArray[np.int64], seed: int) -> WindowStarts:
        """Return where the windows of `samples` of the run (n,) start: (n, 3)."""
        numbers, windows = mix.draw(samples, self.samples_per_block, [part.count for part in self.sets], seed)
        starts = np.empty((len(samples), 3), dtype=np.int64)
        for number, selection in sample_order.groups(numbers):
            starts[selection] = self.sets[number].locate(windows[selection])
        starts[:, 0] = numbers
        return starts


@dataclass(frozen=True)
class Windows:
    """The windows of one split: `block_size` + 1 tokens each, `stride` tokens from one start to the next."""

    split: Split
    block_size: int
    stride: int
    vocab_size: int

    @property
    def count(self) -> int:
        return sample_order.window_count(self.split.tokens, self.block_size, self.stride)

    def locate(self, windows: NDArray[np.int64]) -> WindowStarts:
        """Return where `windows` (B,) start (B, 3), as those of data set number 0."""
        shards, offsets = self.split.locate(windows * self.stride)
        return np.stack([np.zeros_like(shards), shards, offsets], axis=1)

    def read(self, windows: NDArray[np.int64]) -> Tensor:
        """Read `windows` (B,): (B, T+1), see `read_windows`."""
        return read_windows([self], self.locate(windows))


def read_windows(sets: Sequence[Windows], starts: WindowStarts) -> Tensor:
    """Read the windows that start at `starts` (B, 3): (B, T+1).

    The tensor has the bits of the shards' uint16 or uint32 as int16 or int32, so that only 2 or 4 bytes of each token
    are copied to a device. ``hpcgpt.training.step.to_inputs_and_targets`` converts them to int64.

    Raises:
        InputError: an id outside of the vocabulary; the message names the shard and the offset.
    """
    size, vocab_size = sets[0].block_size + 1, sets[0].vocab_size
    batch = _gather([part.split for part in sets], starts, size)
    if int(batch.max()) >= vocab_size:
        row, column = map(int, np.argwhere(batch >= vocab_size)[0])
        number, shard, offset = map(int, starts[row])
        split = sets[number].split
        raise InputError(
            f"id {batch[row, column]} is outside of the vocabulary of {vocab_size:,} ids "
            f"({split.where(int(split.starts[shard]) + offset + column)}): check the shards with "
            "`python -m data_prep.verify`"
        )
    return torch.from_numpy(batch.view(f"i{batch.itemsize}"))


def _gather(splits: Sequence[Split], starts: WindowStarts, size: int) -> Tokens:
    """Copy the `size` tokens at each of `starts`: (B, size).

    Joining slices of memory maps costs less per window than numpy's indexing, wherever the windows are.
    """
    mapped, count, most = shard_reader.mapped(), len(starts), shard_reader.most_maps()
    if count > most:  # a slice keeps its map open until it is joined
        return np.concatenate([_gather(splits, starts[i : i + most], size) for i in range(0, count, most)])
    width = splits[0].width
    listed = starts.tolist()
    parts = [mapped(splits[number], shard)[offset : offset + size] for number, shard, offset in listed]
    content = bytearray().join(parts)
    if len(content) < count * size * width.bytes:  # a window extends beyond the end of its shard, which is rare
        for i, (number, shard, offset) in enumerate(listed):
            if len(parts[i]) < size:
                parts[i] = splits[number].read(int(splits[number].starts[shard]) + offset, size).data
        content = bytearray().join(parts)
    batch: Tokens = np.frombuffer(content, dtype=width.dtype).reshape(count, size)
    return batch
