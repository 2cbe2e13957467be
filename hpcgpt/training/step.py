"""One optimizer step: accumulate, reduce, clip, step. It neither logs nor saves.

Nothing here waits for the device, so that the host is ahead of it by a step; but for `skip_nonfinite`, which has to
know the norm before the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcgpt.distributed.world import Ranks
from hpcgpt.optim.optimizer import set_learning_rate
from hpcgpt.training.parallel import clear_gradients, clip, without_sync
from hpcgpt.training.stragglers import LocalTime

Precision = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Outcome:
    """What a step gives, on the device: nobody has waited for it.

    `loss`: mean in nats over the targets of the global batch (); `norm`: of the gradient, before clipping (). Both are
    the same on every rank. `own`: what each micro-batch of this rank adds to its mean loss, () each. `skipped`: the
    weights were left as they were.
    """

    loss: Tensor
    norm: Tensor
    own: list[Tensor]
    skipped: bool = False


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    micro_steps: int,
    rate: float,
    clip_norm: float,
    precision: Precision,
    ranks: Ranks,
    local: LocalTime | None = None,
    skip_nonfinite: bool = False,
) -> Outcome:
    """`micro_batches` yields `micro_steps` pairs of inputs and targets (B, T) of this rank.

    `local` is told of the time before the gradients are reduced. With `skip_nonfinite` weights and optimizer stay as
    they are where loss or norm is no finite number: on all ranks, since both are the same on all.
    """
    own = accumulate(model, micro_batches, micro_steps, precision, local)
    # Without a limit the norm is still measured: an infinite one clips nothing.
    norm = clip(model, clip_norm or float("inf"))
    loss = mean_over_ranks(sum(own[1:], own[0]), ranks)
    skipped = skip_nonfinite and not (math.isfinite(float(norm)) and math.isfinite(float(loss)))
    if not skipped:
        set_learning_rate(optimizer, rate)
        optimizer.step()
    clear_gradients(model, optimizer)
    return Outcome(loss, norm, own, skipped)


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    micro_steps: int,
    precision: Precision,
    local: LocalTime | None = None,
) -> list[Tensor]:
    """Leave the gradient of the mean loss over the global batch in the parameters; what each micro-batch adds to this
    rank's mean loss.

    Gradients are all-reduced once, behind the last micro-batch; see hpcgpt.training.parallel for what the modes do.
    """
    own = []
    if local:
        local.start()
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        with without_sync(model) if number < micro_steps else nullcontext():
            with precision():
                loss = model(inputs, targets) / micro_steps
            if local and number == micro_steps:
                local.stop()  # from here on it waits for the other ranks
            loss.backward()
        own.append(loss.detach())
    return own


def mean_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks.control is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world.size
