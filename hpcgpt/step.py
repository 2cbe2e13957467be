"""One optimizer step: accumulate, reduce, clip, step. It neither logs nor saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgpt.blame import LocalTime
from hpcgpt.optim import set_learning_rate
from hpcgpt.world import Ranks

Precision = Callable[[], AbstractContextManager[None]]


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    micro_steps: int,
    rate: float,
    clip_norm: float,
    precision: Precision,
    ranks: Ranks,
    local: LocalTime | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss in nats over the targets of the global batch, and the gradient's norm before clipping.

    `micro_batches` yields `micro_steps` pairs of inputs and targets (B, T) of this rank. Both results are
    scalar tensors, the same on every rank. `local` is told of the time before the gradients are reduced.
    """
    loss_sum = accumulate(model, micro_batches, micro_steps, precision, local)
    # Without a limit the norm is still measured: an infinite one clips nothing.
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
    set_learning_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean_over_ranks(loss_sum, ranks), norm


def accumulate(
    model: nn.Module,
    micro_batches: Iterable[tuple[Tensor, Tensor]],
    micro_steps: int,
    precision: Precision,
    local: LocalTime | None = None,
) -> Tensor:
    """Leave the gradient of the mean loss over the global batch in the parameters; this rank's mean loss.

    Gradients are all-reduced once, behind the last micro-batch.
    """
    total: Tensor | None = None
    if local:
        local.start()
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        with _without_sync(model) if number < micro_steps else nullcontext():
            with precision():
                loss = model(inputs, targets) / micro_steps
            if local and number == micro_steps:
                local.stop()  # from here on it waits for the other ranks
            loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def mean_over_ranks(value: Tensor, ranks: Ranks) -> Tensor:
    if ranks.control is None:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / ranks.world.size


def _without_sync(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
