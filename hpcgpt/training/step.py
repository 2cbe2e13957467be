"""One optimizer step: accumulate, reduce, clip, step. It neither logs nor saves.

The ranks reduce their gradients, and one vector, `totals`: the loss, and their votes on what to do at the step boundary
(whether to stop, whether a stage of a save is complete). With ddp a step has no other collective; where weights are
sharded, they are gathered too, and the norm of the gradients is a sum over ranks. No GPU waits for the hosts of all
ranks. Votes are 0 or 1, so that their sums are exact in float32 up to 2**24 ranks.

Nothing here waits for the device, so that the host is one step ahead of it; except with `skip_nonfinite`, which needs
loss and norm before the weights change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hpcgpt.distributed.world import Ranks
from hpcgpt.optim.optimizer import set_learning_rate
from hpcgpt.training.parallel import ParallelModel
from hpcgpt.training.stragglers import LocalTime

Precision = Callable[[], AbstractContextManager[None]]
Votes = Callable[[], Sequence[float]]


@dataclass(frozen=True)
class StepResult:
    """The result of a step, in tensors on the device that may not be computed yet.

    `norm`: of the gradient before clipping (), the same on every rank. `micro_losses`: what each micro-batch of this
    rank adds to the rank's mean loss, () each. `skipped`: the weights were not changed. `totals`: see the function of
    this name; None if the ranks have not computed them yet.
    """

    norm: Tensor
    micro_losses: list[Tensor]
    skipped: bool
    totals: Tensor | None


def train_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Tensor],
    *,
    micro_steps: int,
    rate: float,
    clip_norm: float,
    precision: Precision,
    ranks: Ranks,
    local: LocalTime | None = None,
    skip_nonfinite: bool = False,
    votes: Votes = tuple,
) -> StepResult:
    """Make one step on the `micro_steps` micro-batches (B, T+1) of this rank. A collective.

    `local` measures the time before gradients are reduced. With `skip_nonfinite`, weights and optimizer are not changed
    if loss or norm is not finite: on all ranks alike, since both are the same on all. For this alone the loss is needed
    here, and reduced together with `votes`. Otherwise that is left to the caller (`totals`).
    """
    micro_losses = accumulate(model, micro_batches, micro_steps=micro_steps, precision=precision, local=local)
    # Without a limit the norm is still measured: an infinite one clips nothing.
    norm = model.clip_gradients(clip_norm or float("inf"))
    shared = totals(micro_losses, votes(), ranks) if skip_nonfinite else None
    skipped = shared is not None and not (math.isfinite(float(norm)) and math.isfinite(float(shared[0])))
    if not skipped:
        set_learning_rate(optimizer, rate)
        optimizer.step()
    model.clear_gradients(optimizer)
    return StepResult(norm, micro_losses, skipped, shared)


def accumulate(
    model: ParallelModel,
    micro_batches: Iterable[Tensor],
    *,
    micro_steps: int,
    precision: Precision,
    local: LocalTime | None = None,
) -> list[Tensor]:
    """Add the gradient of the mean loss over the global batch to the parameters; return what each micro-batch adds to
    this rank's mean loss.

    Gradients are reduced once, after the last micro-batch; with zero2 and fsdp after each (hpcgpt.training.parallel).
    """
    micro_losses = []
    if local:
        local.start()
    for number, batch in enumerate(micro_batches, start=1):
        inputs, targets = to_inputs_and_targets(batch, model.device)
        with model.accumulating() if number < micro_steps else nullcontext():
            with precision():
                loss = model.module(inputs, targets) / micro_steps
            if local and number == micro_steps:
                local.stop()  # from here on this rank waits for the others
            loss.backward()
        micro_losses.append(loss.detach())
    return micro_losses


def to_inputs_and_targets(batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (B, T) int64 on `device` of a batch (B, T+1) of ``hpcgpt.data.loader``."""
    if device.type == "cpu" and batch.dtype == torch.int16:
        ids = batch.view(torch.uint16).to(torch.int64)  # in one pass
    else:
        ids = to_ids(batch.to(device, non_blocking=True))  # asynchronous from pinned memory
    return ids[:, :-1], ids[:, 1:]


def to_ids(batch: Tensor) -> Tensor:
    """Return the ids (B, T+1) int64 of a batch that has their bits as int16 or int32, on any device.

    Torch supports few operations on uint16 on a GPU, so the sign is masked off after widening. Ids of 32 bits are below
    2**31.
    """
    ids = batch.to(torch.int64)
    if batch.dtype == torch.int16:
        ids &= 0xFFFF
    return ids


def totals(micro_losses: Sequence[Tensor], votes: Sequence[float], ranks: Ranks) -> Tensor:
    """Return the mean loss in nats over the targets of the global batch, then the sums of the ranks' votes (1 + V,).

    A collective; the same on every rank, on the device, in the dtype of the losses.
    """
    loss = sum(micro_losses[1:], micro_losses[0])
    own = torch.tensor([0.0, *votes], dtype=loss.dtype, pin_memory=loss.is_cuda)
    shared = own.to(loss.device, non_blocking=True)  # the host does not wait for the device
    shared[0] = loss
    if ranks.cpu_group is not None:
        dist.all_reduce(shared)
        shared[0] /= ranks.world.size
    return shared
