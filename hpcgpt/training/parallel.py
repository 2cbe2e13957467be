"""How several ranks train one model together: what each of them holds, and what they send each other.

W ranks, N bytes of weights, m micro-batches a step and rank; as many of gradients, 2 N of AdamW's state::

    mode    between steps a rank holds    in a step, beside that           and sends
    ddp     weights and state: 3 N        gradients N                      all-reduce N
    zero1   a share of both: 3 N / W      weights N, gradients N           all-gather N, reduce-scatter N
    fsdp    a share of both: 3 N / W      gradients N / W, and weights     m times: all-gather up to 2 N,
                                          and gradients of a block or two  reduce-scatter N

An all-reduce is a reduce-scatter and an all-gather, so zero1 sends what ddp does. ``ddp`` is DistributedDataParallel.
The others are FSDP2 (``fully_shard``), a group for each block and one for the rest: each parameter is cut by rows, and
rank r has the r-th part. They differ in when whole weights and gradients are let go of: behind each block, or behind
the step. So zero1 is what Rajbhandari et al., "ZeRO", 2020, call stage 1, but that whole weights are not kept between
steps.

A model whose weights are shares cannot be called by one rank alone. To look at (for evaluation, samples) there is the
model itself beside the shares: a shell whose weights are filled in by `gather`, and emptied by `release`.

Gradients are summed in float32 (float64 with that train.dtype) in all modes, so that all modes compute the same up to
the order of sums; gradient_dtype bfloat16 halves what gradients take on their way. Where training computes in bf16 the
weights of blocks are gathered in it: half of N to send and to hold, and nothing for autocast to copy and keep until
the backward pass. That changes nothing but norms' gains and biases, which autocast would have left in float32.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgpt.config.options import Parallel
from hpcgpt.distributed.sharded_tensor import held, is_share, whole
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT


def shared_out(
    model: GPT, ranks: Ranks, settings: Parallel, compiled: bool, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """What training calls, and the module that has this rank's part of the weights, under the names of `model`'s. A
    collective.

    The second is `model` itself, on the device of `ranks`, where each rank has everything: with ddp, and alone. Else
    `model` is left an empty shell. `model` must be the same on all ranks, and on the CPU. `dtype` is what the forward
    pass will compute in.
    """
    if ranks.control is not None and settings.mode != "ddp":
        return _in_shares(model, ranks, settings, compiled, dtype)
    model.to(ranks.device)
    module: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    if ranks.control is None:
        return module, model
    wrapped = DistributedDataParallel(
        module,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    if settings.gradient_dtype == "bfloat16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        # By another name than the library's, which DDP refuses without NCCL, though gloo adds bfloat16, too.
        wrapped.register_comm_hook(None, lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket))
    return wrapped, model


def _in_shares(
    model: GPT, ranks: Ranks, settings: Parallel, compiled: bool, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    # Here, since it takes a second to load.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shares = _moved_out(model, ranks.device)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(ranks.device.type, (ranks.world.size,)),
        "reshard_after_forward": None if settings.mode == "fsdp" else False,  # None: all but the outermost
    }
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.bfloat16 if settings.gradient_dtype == "bfloat16" else exact
    if compiled:  # the parts between the hooks that gather; those stay outside of what is compiled
        shares.mean_loss = torch.compile(shares.mean_loss)
    for block in shares.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mp_policy=MixedPrecisionPolicy(dtype, sums, cast_forward_inputs=False), **options)
    fully_shard(shares, mp_policy=MixedPrecisionPolicy(exact, sums), **options)
    return (Zero1(shares) if settings.mode == "zero1" else shares), shares


def _moved_out(model: GPT, device: torch.device) -> GPT:
    """A model with the weights of `model`, which is left a shell for `device`."""
    same = {id(parameter): nn.Parameter(parameter.data) for parameter in model.parameters()}
    moved = copy.deepcopy(model, same)  # but the weights, which are never there twice
    release(model, device)
    model.to(device)
    return moved


class Zero1(nn.Module):
    """FSDP2 that gathers the weights once a step, and scatters the gradients once, used as DDP is."""

    def __init__(self, shares: nn.Module) -> None:
        super().__init__()
        self.module: Any = shares

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.module(inputs, targets)  # type: ignore[no-any-return]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last."""
        self._keep(True)
        try:
            yield
        finally:
            self._keep(False)

    def _keep(self, whole: bool) -> None:
        self.module.set_requires_gradient_sync(not whole)
        self.module.set_reshard_after_backward(not whole)


# --- a step ----------------------------------------------------------------------------------------


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """In here gradients are added up on each rank, and not sent.

    But with fsdp they are: whole gradients would have to be kept, for whose size fsdp was chosen.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel | Zero1) else nullcontext()


def clear_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Before the next step. DDP's gradients stay, as zeros, since they are views of its buckets: let go of, each would
    be there twice, in its bucket and outside, from the next step's first micro-batch to its last.
    """
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scale the gradients so that their norm, over all parameters, is at most `limit`; what it was before (). A
    collective where ranks have shares of them.
    """
    parameters = list(model.parameters())
    if not any(is_share(parameter) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    own = [held(parameter.grad).local for parameter in parameters if parameter.grad is not None]
    squared = nn.utils.get_total_norm(own).square()
    dist.all_reduce(squared)
    norm = squared.sqrt()
    torch._foreach_mul_(own, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


# --- the shell -------------------------------------------------------------------------------------


@torch.no_grad()
def gather(shares: nn.Module, shell: nn.Module) -> None:
    """Give `shell` the whole weights of the model whose `shares` the ranks have. A collective."""
    for share, parameter in zip(shares.parameters(), shell.parameters(), strict=True):
        parameter.data = whole(share.detach())


@torch.no_grad()
def release(shell: nn.Module, device: torch.device) -> None:
    """Let go of the weights: each is one number, not a number, and has the shape still."""
    for parameter in shell.parameters():
        parameter.data = torch.full((), math.nan, dtype=parameter.dtype, device=device).expand(parameter.shape)
