"""Validation: the loss over held-out windows, shared out over the ranks.

The windows are spread evenly over the split and are the same for any number of ranks: batch b belongs
to rank b mod R, and sums are taken in float64. Dropout and z-loss are off, no gradient is made, and no random
generator is touched.

Bits per byte compare models with different tokenizers: the loss of all targets, end-of-text tokens
included, in bits, over the bytes of the text that they stand for.

Where several data sets are mixed, each that has a validation split is evaluated for itself, and the figures
are the means over those, with the weights of the mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from hpcgpt.data.loader import Windows, widen
from hpcgpt.distributed.world import Ranks
from hpcgpt.plan import Plan
from hpcgpt.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """The validation windows of one data set, and its weight in the mix."""

    name: str
    windows: Windows
    weight: int


@dataclass(frozen=True)
class Terms:
    """On what terms to evaluate: `batches` of `micro_batch` windows, 0: the whole split.

    `token_bytes` (V,) are the bytes of text that each id stands for. `stopped` is asked, by all ranks together,
    before each round of one batch a rank.
    """

    batches: int
    micro_batch: int
    token_bytes: NDArray[np.int64]
    ranks: Ranks
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    stopped: Callable[[], bool] = lambda: False

    def windows_of(self, windows: Windows) -> int:
        """How many of `windows` are evaluated."""
        return windows.count if self.batches == 0 else min(windows.count, self.batches * self.micro_batch)


def held_out(planned: Plan) -> list[HeldOut]:
    """Those of each data set that has a validation split: one behind the other, whatever data.stride is."""
    context, size = planned.config.model.block_size, planned.config.model.vocab_size
    return [
        HeldOut(part.name, Windows(part.val, context, context, size), part.quota) for part in planned.sets if part.val
    ]


def bytes_of_ids(words: Tokenizer, count: int) -> NDArray[np.int64]:
    """The bytes of text that each of `count` ids stands for (count,): 0 for those that the tokenizer does not have."""
    found = np.zeros(count, dtype=np.int64)
    found[: words.vocab_size] = words.token_bytes
    return found


def evaluate_all(model: nn.Module, sets: Sequence[HeldOut], terms: Terms) -> dict[str, float] | None:
    """As `evaluate`, over one or several data sets. If they are several there is also a ``val/loss/NAME`` for each."""
    found = []
    for part in sets:
        figures = evaluate(model, part.windows, terms)
        if figures is None:
            return None
        found.append(figures)
    return found[0] if len(found) == 1 else combined(sets, found)


def combined(sets: Sequence[HeldOut], found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of a mix from those of its parts."""
    total = sum(part.weight for part in sets)

    def mean(key: str) -> float:
        return math.fsum(part.weight * figures[key] for part, figures in zip(sets, found, strict=True)) / total

    loss = mean("val/loss")
    return {
        "val/loss": loss,
        "val/perplexity": _perplexity(loss),
        "val/bits_per_byte": mean("val/bits_per_byte"),
        **{f"val/loss/{part.name}": figures["val/loss"] for part, figures in zip(sets, found, strict=True)},
    }


@torch.no_grad()
def evaluate(model: nn.Module, windows: Windows, terms: Terms) -> dict[str, float] | None:
    """The ``val/...`` figures, the same on every rank; None if `terms.stopped` said so first. A collective."""
    micro_batch, ranks, count = terms.micro_batch, terms.ranks, terms.windows_of(windows)
    chosen = np.arange(count) * windows.count // count
    parts = [chosen[i : i + micro_batch] for i in range(0, count, micro_batch)]
    # loss in nats, targets, bytes of text
    sums = torch.zeros(3, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for first in range(0, len(parts), ranks.world.size):
            if terms.stopped():
                return None
            number = first + ranks.world.rank
            if number < len(parts):
                sums += _batch_sums(model, windows, parts[number], terms)
    finally:
        model.train(training)
    if ranks.control is not None:
        dist.all_reduce(sums, group=ranks.control)
    nats, targets, text_bytes = sums.tolist()
    loss = nats / targets
    return {
        "val/loss": loss,
        "val/perplexity": _perplexity(loss),
        "val/bits_per_byte": nats / math.log(2) / text_bytes,
    }


def _batch_sums(model: nn.Module, windows: Windows, part: NDArray[np.int64], terms: Terms) -> torch.Tensor:
    batch = windows.read(part)
    inputs, targets = widen(batch, terms.ranks.device)
    with terms.precision():
        loss = model(inputs, targets)
    ids = batch.numpy()
    text_bytes = int(terms.token_bytes[ids.view(f"u{ids.itemsize}")[:, 1:]].sum())
    return torch.tensor([float(loss) * targets.numel(), targets.numel(), text_bytes], dtype=torch.float64)


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
