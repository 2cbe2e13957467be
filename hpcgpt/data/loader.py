"""This rank's batches, straight from the memory-mapped shards: computed, not remembered.

Global step s is samples [s*G, (s+1)*G) of the run (see ``hpcgpt.data.sample_order``, and ``hpcgpt.data.mix`` where
several data sets are mixed). Rank r of R takes the r-th of R equal slices of those, and works through it in
micro-batches. So the loader has no state to save, no worker processes to shield from signals, and any number
of ranks that divides the work sees the same samples in the same global batches.

Where samples lie is worked out for up to 16,384 of this rank's ahead, since a permutation costs numpy as much
for 64 places as for thousands. What is kept of it follows from the configuration alone.
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

# Where windows begin (B, 3): the data set, the shard in it, and the offset in that shard's tokens.
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """The windows of one split, of `context` + 1 tokens each."""

    split: Split
    context: int
    stride: int
    vocab_size: int

    @property
    def count(self) -> int:
        return sample_order.window_count(self.split.tokens, self.context, self.stride)

    def rows(self, windows: NDArray[np.int64]) -> Rows:
        """Where `windows` (B,) begin (B, 3)."""
        shards, offsets = self.split.locate(windows * self.stride)
        return np.stack([np.zeros_like(shards), shards, offsets], axis=1)

    def read(self, windows: NDArray[np.int64]) -> Tensor:
        """The tokens of `windows` (B,) as a tensor (B, T+1); see `Mixture.read`."""
        return Mixture([self]).read(self.rows(windows))


@dataclass(frozen=True)
class Mixture:
    """The windows of several data sets, or of one; `quotas` are their places in a block of the mix."""

    sets: Sequence[Windows]
    quotas: Sequence[int] = (mix.BLOCK,)

    def draw(self, samples: NDArray[np.int64], seed: int) -> Rows:
        """Where the windows of `samples` of the run (n,) begin (n, 3)."""
        sets, windows = mix.draw(samples, self.quotas, [part.count for part in self.sets], seed)
        rows = np.empty((len(samples), 3), dtype=np.int64)
        for d, chosen in sample_order.groups(sets):
            rows[chosen] = self.sets[d].rows(windows[chosen])
        rows[:, 0] = sets
        return rows

    def read(self, rows: Rows) -> Tensor:
        """The windows that begin at `rows` (B, 3) as a tensor (B, T+1), the shards' bits as int16 or int32; see
        `widen`.

        Raises:
            InputError: an id outside of the vocabulary; the message names the shard and the place.
        """
        size = self.sets[0].context + 1
        batch = _gather([part.split for part in self.sets], rows, size)
        vocab_size = self.sets[0].vocab_size
        if int(batch.max()) >= vocab_size:
            row, column = map(int, np.argwhere(batch >= vocab_size)[0])
            d, shard, offset = map(int, rows[row])
            split = self.sets[d].split
            raise InputError(
                f"id {batch[row, column]} is outside of the vocabulary of {vocab_size:,} ids "
                f"({split.where(int(split.starts[shard]) + offset + column)}): check the shards with "
                "`python -m data_prep.verify`"
            )
        return torch.from_numpy(batch.view(f"i{batch.itemsize}"))


@dataclass(frozen=True)
class Loader:
    """The training batches of one rank."""

    windows: Windows | Mixture
    seed: int
    rank: int
    world_size: int
    global_batch: int
    micro_batch: int

    def batch(self, step: int, micro_step: int) -> Tensor:
        """Micro-batch `micro_step` of optimizer step `step`, both counted from 0 (B, T+1)."""
        number = step * (self._share // self.micro_batch) + micro_step
        block, place = divmod(number, self._batches_ahead)
        rows = self._drawn(block)[place * self.micro_batch : (place + 1) * self.micro_batch]
        return self._source.read(rows)

    def samples(self, step: int, micro_step: int) -> range:
        """The numbers of the samples of that micro-batch, counted over the whole run."""
        first = step * self.global_batch + self.rank * self._share + micro_step * self.micro_batch
        return range(first, first + self.micro_batch)

    @cached_property
    def _share(self) -> int:
        """Samples of this rank in a global batch."""
        return self.global_batch // self.world_size

    @cached_property
    def _batches_ahead(self) -> int:
        # Not much more than an epoch: each epoch has a permutation of its own.
        an_epoch = sum(part.count for part in self._source.sets) // self.world_size
        return max(1, min(_AHEAD, an_epoch) // self.micro_batch)

    @cached_property
    def _source(self) -> Mixture:
        return self.windows if isinstance(self.windows, Mixture) else Mixture([self.windows])

    @cached_property
    def _drawn(self) -> Callable[[int], Rows]:
        return lru_cache(maxsize=2)(self._draw)

    def _draw(self, block: int) -> Rows:
        """Where this rank's samples number block * n ... (block + 1) * n - 1 begin (n, 3)."""
        count = self._batches_ahead * self.micro_batch
        steps, places = np.divmod(np.arange(block * count, (block + 1) * count, dtype=np.int64), self._share)
        return self._source.draw(steps * self.global_batch + self.rank * self._share + places, self.seed)


def widen(batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64 on `device`, from a batch (B, T+1) of the shards' bits.

    The narrow form crosses the bus: 2 or 4 bytes a token instead of 16. Ids of 32 bits are below 2**31.
    """
    if device.type == "cpu" and batch.dtype == torch.int16:
        ids = batch.view(torch.uint16).to(torch.int64)  # in one pass
    else:
        ids = unsigned(batch.to(device, non_blocking=True))  # without waiting, where it lies in pinned memory
    return ids[:, :-1], ids[:, 1:]


def unsigned(batch: Tensor) -> Tensor:
    """The ids (B, T+1) int64 whose bits `batch` has, on any device.

    Of uint16 torch promises little on a GPU, so the sign is masked away after widening.
    """
    ids = batch.to(torch.int64)
    if batch.dtype == torch.int16:
        ids &= 0xFFFF
    return ids


def _gather(splits: Sequence[Split], rows: Rows, size: int) -> Tokens:
    """The `size` tokens at each of `rows` (B, size).

    Joining slices of memory maps is what costs least a row, and less than numpy's ways, wherever the rows lie.
    """
    mapped, count, most = shard_reader.mapped(), len(rows), shard_reader.most_maps()
    if count > most:  # a slice keeps its map open until it is joined
        return np.concatenate([_gather(splits, rows[i : i + most], size) for i in range(0, count, most)])
    width = splits[0].width
    places = rows.tolist()
    parts = [mapped(splits[d], shard)[start : start + size] for d, shard, start in places]
    content = bytearray().join(parts)
    if len(content) < count * size * width.bytes:  # a window reaches over the end of its shard, which is rare
        for row, (d, shard, start) in enumerate(places):
            if len(parts[row]) < size:
                parts[row] = splits[d].read(int(splits[d].starts[shard]) + start, size).data
        content = bytearray().join(parts)
    batch: Tokens = np.frombuffer(content, dtype=width.dtype).reshape(count, size)
    return batch
