"""Training one model on several ranks: what each rank holds, and what the ranks send each other.

W ranks, N bytes of weights, m micro-batches for each step and rank; gradients are N bytes too, AdamW's state 2 N::

    mode    between steps a rank holds    in a step, in addition           and sends
    ddp     weights and state: 3 N        gradients N                      all-reduce N
    zero1   a shard of both: 3 N / W      weights N, gradients N           all-gather N, reduce-scatter N
    zero2   a shard of both: 3 N / W      weights N, gradients N / W,      all-gather N, and
                                          and those of a block or two      m times reduce-scatter N
    fsdp    a shard of both: 3 N / W      gradients N / W, and weights     m times: all-gather up to 2 N,
                                          and gradients of a block or two  reduce-scatter N

An all-reduce is a reduce-scatter and an all-gather, so zero1 sends as much as ddp. ``ddp`` is DistributedDataParallel.
The others are FSDP2 (``fully_shard``), with a group for each block and one for the rest: each parameter is sharded by
rows, and rank r has the r-th part. They differ in when full weights and gradients are freed: after each block, or after
the step. So zero1 and zero2 are stages 1 and 2 of Rajbhandari et al., "ZeRO", 2020, except that full weights are not
kept between steps. zero2 adds the same numbers in the same order as fsdp: its result has the same bytes.

With `parallel.shard_within` G < W ranks, each group of G consecutive ranks holds a copy: W in the table is G then, and
an all-gather or a reduce-scatter stays within a group, for example within a node. Then the groups add up their
gradients: an all-reduce of N / G between ranks with the same rows, once for each step. PyTorch calls it hybrid
sharding: the mesh of ranks has two dimensions.

A sharded model is built without memory for its weights. Each tensor is drawn whole on the CPU and freed again once
each rank has its rows, so that no rank ever holds all weights, and the initial ones are those of any other mode.

It cannot run on one rank alone: each forward pass gathers blocks from all ranks. For an evaluation or a sample all
ranks make the same number of passes inside of `ParallelModel.evaluating`.

With ddp every rank updates its own copy of the weights, and in groups every group does. Gradients are summed for all of
them, and weights are never compared: the copies stay equal because the updates have the same bytes, which only equal
hardware computes. Otherwise they drift apart until the next start, and a checkpoint has some tensors of each (`drift`).
With Muon most: it computes in bfloat16, with 16 bits less than AdamW's float32.

Gradients are summed in float32 (float64 with that train.dtype) in all modes, so that all modes compute the same result
up to the order of sums; gradient_dtype bfloat16 halves the bytes that are sent. When training computes in bf16, the
weights of blocks are gathered in bf16: half of N to send and to hold, and autocast need not cast and keep them for the
backward pass. This changes only the gains and biases of norms, which autocast would have left in float32. Evaluations
and samples compute with the same weights as training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hpcgpt.config.options import Config, Parallel
from hpcgpt.distributed.collectives import distinct_on_all
from hpcgpt.distributed.eager_ddp import eager_ddp
from hpcgpt.distributed.sharded_tensor import is_sharded, local_rows
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError
from hpcgpt.model import loss
from hpcgpt.model.gpt import GPT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass
class ParallelModel:
    """A model as its ranks train it; see `parallelize`.

    `module` is called to train. `gpt` is the model itself, with this rank's part of the weights: for the optimizer and
    for checkpoints; and to compute without training, inside of `evaluating`. `in_step`: weights are sharded, and each
    forward pass needs all ranks. `mesh`: the ranks, by group and number in it, if there are several groups.
    `keeps_weights`, `keeps_gradients`: full ones are kept for all micro-batches of a step.
    """

    module: nn.Module
    gpt: GPT
    device: torch.device
    in_step: bool = False
    mesh: DeviceMesh | None = None
    keeps_weights: bool = False
    keeps_gradients: bool = False

    @contextmanager
    def evaluating(self) -> Iterator[GPT]:
        """Yield `gpt` for passes without gradients, not compiled, as ``hpcgpt eval`` has it.

        If weights are sharded, all ranks must make the same number of passes inside.
        """
        if not self.in_step:
            yield self.gpt
            return
        gpt: Any = self.gpt
        gpt.unshard()  # all but the blocks, which do so by themselves: GPT.hidden may be called without GPT.forward
        try:
            with _not_compiled(self.gpt):
                yield self.gpt
        finally:
            for module in (gpt, *gpt.blocks):
                module.reshard()  # else the next step would compute with the weights of today

    def accumulating(self) -> AbstractContextManager[None]:
        """Return a context for the micro-batches of a step before its last one.

        Gradients are not sent in it. Those of zero2 and fsdp are, but only within a group: full gradients would have to
        be kept, whose size is the reason to choose these modes. Weights are freed as the mode says.
        """
        if isinstance(self.module, DistributedDataParallel):
            return self.module.no_sync()
        return self._keeping() if self.in_step else nullcontext()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keep inside what this mode keeps until the end of a step; after the last micro-batch it is freed."""
        sharded: Any = self.gpt
        switches = [sharded.set_requires_all_reduce] if self.mesh else []
        if self.keeps_weights:
            switches.append(sharded.set_reshard_after_backward)
        if self.keeps_gradients:
            switches.append(sharded.set_requires_gradient_sync)
        try:
            for switch in switches:
                switch(False)
            yield
        finally:
            for switch in switches:
                switch(True)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`, over all parameters; return the norm before ().

        A collective if weights are sharded.
        """
        parameters = list(self.module.parameters())
        if not any(is_sharded(parameter) for parameter in parameters):
            return nn.utils.clip_grad_norm_(parameters, limit)
        gradients = [local_rows(parameter.grad).local for parameter in parameters if parameter.grad is not None]
        squared = nn.utils.get_total_norm(gradients).square()
        # The ranks of a group have all rows between them; another group has the same.
        dist.all_reduce(squared, group=self.mesh.get_group("shards") if self.mesh else None)
        norm = squared.sqrt()
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Clear the gradients before the next step.

        DDP's are set to zero and kept, because they are views of its buckets. If they were freed, each gradient would
        exist twice, in its bucket and outside, from the first micro-batch of the next step to the last.
        """
        optimizer.zero_grad(set_to_none=not isinstance(self.module, DistributedDataParallel))


def shards_weights(ranks: Ranks, settings: Parallel) -> bool:
    """Return whether each rank is to hold a part of the weights."""
    return ranks.cpu_group is not None and settings.mode != "ddp"


def drift(settings: Config, in_effect: Mapping[str, Any], groups: bool, cpus_have_bf16: set[bool]) -> str:
    """Return a warning if copies of the weights would drift apart (see the module's docstring), else ''.

    `in_effect`: see ``hpcgpt.training.in_effect``. `groups`: there are several groups of ranks with a copy each.
    `cpus_have_bf16`: what the ranks' CPUs have, if they train on them.
    """
    if in_effect["ranks"] == 1 or (settings.parallel.mode != "ddp" and not groups):
        return ""
    on_gpu = in_effect["run.device"] != "cpu"
    found = in_effect["gpu" if on_gpu else "cpu_capability"]
    if not isinstance(found, str):
        unlike = " and ".join(found if on_gpu else (f"CPUs with {name}" for name in found))
    elif not on_gpu and len(cpus_have_bf16) > 1:
        unlike = "CPUs with and without bfloat16"
    else:
        return ""
    copies = "every rank" if settings.parallel.mode == "ddp" else "every group of parallel.shard_within"
    remedy = "parallel.mode zero1" + (" with parallel.shard_within all" if groups else "")
    muon = ", with optim.name muon soon and visibly" if settings.optim.name == "muon" else ""
    return (
        f"the ranks compute on {unlike}: {copies} updates its own copy of the weights, and on unlike hardware these "
        f"copies round differently and drift apart{muon}. {remedy} keeps one copy, so that none can differ"
    )


def parallelize(
    gpt: GPT, ranks: Ranks, settings: Parallel, *, seed: int, compiled: bool, dtype: torch.dtype
) -> ParallelModel:
    """Distribute `gpt` over the ranks. A collective.

    `gpt` must be the same on all ranks: on the CPU; on the device "meta" if weights are sharded (`shards_weights`). It
    is moved to the ranks' device, and then has the initial weights of `seed`. `dtype` is that of the forward pass.
    """
    if shards_weights(ranks, settings):
        return _sharded(gpt, ranks, settings, seed, compiled, dtype)
    gpt.to(ranks.device)
    module: nn.Module = torch.compile(gpt) if compiled else gpt  # type: ignore[assignment]
    if ranks.cpu_group is None:
        return ParallelModel(module, gpt, ranks.device)
    wrapped = (DistributedDataParallel if compiled else eager_ddp)(
        module,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    if settings.gradient_dtype == "bfloat16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        # Wrapped: DDP refuses the library's hook by its name without NCCL, though gloo can sum bfloat16 too.
        wrapped.register_comm_hook(None, lambda group, bucket: default_hooks.bf16_compress_hook(group, bucket))
    return ParallelModel(wrapped, gpt, ranks.device)


def _sharded(
    gpt: GPT, ranks: Ranks, settings: Parallel, seed: int, compiled: bool, dtype: torch.dtype
) -> ParallelModel:
    # Imported here, since it takes a second.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh, keeps_weights = _mesh(ranks, settings.shard_within), settings.mode != "fsdp"
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": False if keeps_weights else None,  # None: all but the outermost
    }
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    sums = torch.bfloat16 if settings.gradient_dtype == "bfloat16" else exact
    if compiled:  # what is between FSDP's hooks; the hooks themselves are not compiled
        gpt.mean_loss = torch.compile(gpt.mean_loss)
    for block in gpt.blocks:
        if compiled:
            block.compile()
        fully_shard(block, mp_policy=MixedPrecisionPolicy(dtype, sums, cast_forward_inputs=False), **options)
    fully_shard(gpt, mp_policy=MixedPrecisionPolicy(exact, sums), **options)
    gpt.to_empty(device=ranks.device)
    gpt.initialise(seed, _keep_own_rows)
    return ParallelModel(
        gpt,
        gpt,
        ranks.device,
        in_step=True,
        mesh=mesh if mesh.ndim == 2 else None,
        keeps_weights=keeps_weights,
        keeps_gradients=settings.mode == "zero1",
    )


def _mesh(ranks: Ranks, within: str) -> DeviceMesh:
    """Return the mesh of all ranks: of one dimension, or of two if there are several groups. A collective.

    Raises:
        UserError: the ranks of nodes are not such groups.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = ranks.world.size
    group = _ranks_of_a_node(ranks) if within == "node" else size if within == "all" else int(within)
    if group == size:
        return init_device_mesh(ranks.device.type, (size,))
    return init_device_mesh(ranks.device.type, (size // group, group), mesh_dim_names=("groups", "shards"))


def _ranks_of_a_node(ranks: Ranks) -> int:
    world = ranks.world
    is_in_order = world.rank % world.local_size == world.local_rank
    found_on_all = distinct_on_all(ranks, lambda: (world.local_size, is_in_order))
    fewest, most = min(found_on_all)[0], max(found_on_all)[0]
    if fewest != most or (fewest, False) in found_on_all:
        found = f"nodes have {fewest} to {most}" if fewest != most else "they are numbered across nodes"
        raise UserError(
            f"parallel.shard_within node needs equally many ranks on each node, numbered node by node, and {found}: "
            "start them so (srun --ntasks-per-node=N --distribution=block), or give a number of ranks"
        )
    if fewest == 1:
        raise UserError(
            "parallel.shard_within node would shard nothing, since each node has one rank: use all or a number of ranks"
        )
    return fewest


def _keep_own_rows(parameter: nn.Parameter, whole: Tensor) -> None:
    """Fill this rank's rows of a parameter from all of its weights."""
    own = local_rows(parameter.detach())
    own.local.copy_(whole[own.start : own.stop])


@contextmanager
def _not_compiled(gpt: GPT) -> Iterator[None]:
    """Run what `_sharded` has compiled as it is written, inside."""
    compiled, mean_loss = [block._compiled_call_impl for block in gpt.blocks], gpt.mean_loss
    if not all(compiled):
        yield
        return
    try:
        gpt.mean_loss = loss.mean_loss
        for block in gpt.blocks:
            block._compiled_call_impl = None
        yield
    finally:
        gpt.mean_loss = mean_loss
        for block, call in zip(gpt.blocks, compiled, strict=True):
            block._compiled_call_impl = call
