"""The memory of one rank, from optimizer steps of our own model, parallel mode and optimizer on fake tensors.

Nothing is computed and no GPU is used: fake tensors have shapes and no memory, and the process group of N ranks is one
that sends nothing (``torch.testing._internal.distributed.fake_pg``), so that this process is rank 0 of N. What runs is
what trains: ``parallelize``, ``make_optimizer``, ``train_step``. Only DistributedDataParallel is replaced by gradient
buckets of the same size, because its C++ part reads the values of tensors.

`main` reads requests as JSON from stdin and prints one line of JSON for each: ``hpcgpt.estimate.memory`` runs it in a
process, so that no other loads torch.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from hpcgpt.checkpoint.save import local_state_dict, share_of
from hpcgpt.config.options import Config, Model, Optim
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.estimate.account import GPU_FRAMEWORK_BYTES, PARTS, Memory, Moment
from hpcgpt.estimate.request import Request, from_json
from hpcgpt.estimate.storage_log import StorageLog
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.precision import computing_in, pick_dtype
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.training.parallel import ParallelModel, parallelize, shards_weights
from hpcgpt.training.step import accumulate, to_inputs_and_targets, train_step

CPU = torch.device("cpu")
BUCKET_BYTES = 25 << 20  # of DistributedDataParallel, whose first bucket has 1 MiB
FIRST_BUCKET_BYTES = 1 << 20


def main() -> None:
    """Answer the requests on stdin, a line each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    framework = _Framework.measured_here()
    for line in sys.stdin:
        request = from_json(line)
        print(json.dumps(asdict(measure(request, framework.bytes(request)))), file=answers, flush=True)


@dataclass(frozen=True)
class _Framework:
    """The bytes that a rank holds beside its tensors: Python, torch and this package, without and with the compiler."""

    eager: int
    compiler: int

    @classmethod
    def measured_here(cls) -> _Framework:
        """Measure this process, in which nothing has loaded torch's compiler yet. Loads it, as fake tensors do."""
        eager = _loaded_and_stepped()
        importlib.import_module("torch._dynamo")
        return cls(eager, max(eager, resident_bytes()))

    def bytes(self, request: Request) -> int:
        """Return the bytes of a rank of `request`."""
        return self.compiler if loads_compiler(request) else self.eager


def loads_compiler(request: Request) -> bool:
    """Return whether a rank loads torch's compiler.

    Beside torch.compile, FSDP does, activation checkpointing (``torch.utils.checkpoint``), the compiler's own settings
    for train.deterministic, and document masks on a GPU, whose kernel is always compiled.
    """
    config, train = request.config, request.config.train
    compiled = train.compile == "on" or (train.compile == "auto" and not request.on_cpu)
    sharded = request.ranks > 1 and config.parallel.mode != "ddp"
    masked = config.data.document_mask and not request.on_cpu
    return compiled or sharded or train.activation_checkpointing or train.deterministic or masked


def _loaded_and_stepped() -> int:
    """Return what this process holds after a real step of a model of almost nothing."""
    import hpcgpt.training.attempt  # noqa: F401 - what each rank loads

    model = GPT(Model(n_layer=1, n_head=1, n_embd=32, block_size=32, vocab_size=64))
    optimizer = make_optimizer(model, Optim())
    ids = torch.zeros(1, 32, dtype=torch.int64)
    model(ids, ids).backward()  # libraries load kernels at their first use
    optimizer.step()
    return resident_bytes()


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def measure(request: Request, framework_bytes: int) -> Memory:
    """Return the memory of rank 0. `framework_bytes`: what a process holds that has loaded torch, and no model."""
    config = request.config
    with (
        fake_ranks(request.ranks) as ranks,
        FakeTensorMode(allow_non_fake_inputs=True),
        StorageLog(request.on_cpu) as log,
    ):
        step = _Step(request, ranks, log)
        parameters, flops = step.gpt.parameter_count(), step.gpt.flops_per_token()
        sizes = [4 * parameter.numel() for parameter in step.gpt.parameters()]
        made = max(sizes) if step.model.in_step else sum(sizes)
        step.run()
        if config.eval.every:
            step.evaluate()
        tensors = local_state_dict(step.model.gpt, step.optimizer, ranks)
        sizes = [tensor.nbytes for tensor in share_of(tensors, ranks).values()]
        copied = sum(sizes)
        saved = step.saved_bytes()
        moments = _moments(log, framework_bytes if request.on_cpu else GPU_FRAMEWORK_BYTES)
        del step, tensors
    if request.on_cpu:
        if request.saves_while_training:
            moments.append(_with_copy(max(moments, key=lambda moment: moment.total), copied))
        host = max(moment.total for moment in moments)
    else:
        # Weights are made in host memory, sharded ones tensor by tensor, and freed there before the first save, which
        # copies each tensor into pinned memory.
        host = framework_bytes + max(made, sum(map(pinned_bytes, sizes)))
    return Memory(
        tuple(moments), parameters, flops, saved, copied, host, "fake tensors", tuple(_remarks(request, config))
    )


def pinned_bytes(size: int) -> int:
    """Return how much pinned memory torch takes for a tensor of so many bytes: a power of two."""
    return 1 << (size - 1).bit_length()


@contextmanager
def fake_ranks(size: int) -> Iterator[Ranks]:
    """Be rank 0 of `size` ranks that send nothing."""
    world = World(0, 0, size, size, "torchrun", "estimate")
    if size == 1:
        yield Ranks(world, CPU, None)
        return
    from torch.distributed import device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    make_mesh = device_mesh.init_device_mesh

    def make_real_mesh(*arguments: Any, **named: Any) -> device_mesh.DeviceMesh:
        with unset_fake_temporarily():  # it reads the numbers of ranks from a tensor
            return make_mesh(*arguments, **named)

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    device_mesh.init_device_mesh = make_real_mesh
    try:
        yield Ranks(world, CPU, dist.group.WORLD)
    finally:
        device_mesh.init_device_mesh = make_mesh
        dist.destroy_process_group()


class _Step:
    """Model, optimizer and batches of the rank, on fake tensors."""

    def __init__(self, request: Request, ranks: Ranks, log: StorageLog) -> None:
        self._request, self._ranks, self._log = request, ranks, log
        config = request.config
        dtype = pick_dtype(config.train.dtype, CPU)
        log.phase("start")
        with log.within("weights"):
            self.gpt = _model(request, ranks, dtype)
            self.gpt.mean_loss = _logged_loss(self.gpt.mean_loss, log)
            self.model = _parallel(self.gpt, ranks, config, dtype, log)
        for parameter in self.model.gpt.parameters():
            log.label(parameter, "weights")
        self.optimizer = make_optimizer(self.model.gpt, config.optim)
        self.optimizer.register_step_pre_hook(lambda *_: self._before_optimizer())
        self.optimizer.register_step_post_hook(lambda *_: self._after_optimizer())
        self._precision: Callable[[], Any] = lambda: computing_in(dtype, CPU)

    def run(self) -> None:
        """Warm up, make the optimizer's state, then make one whole step."""
        log, config, micro_steps = self._log, self._request.config, self._request.micro_steps
        self.model.module.train()
        with log.within("activations"):
            accumulate(self.model, [self._batch()], micro_steps=1, precision=self._precision)
            self.optimizer.step()
            self.model.clear_gradients(self.optimizer)
            log.phase("step")
            train_step(
                self.model,
                self.optimizer,
                [self._batch() for _ in range(micro_steps)],
                micro_steps=micro_steps,
                rate=config.optim.lr,
                clip_norm=config.optim.clip_norm,
                precision=self._precision,
                ranks=self._ranks,
            )

    def evaluate(self) -> None:
        """Compute the loss of one batch of an evaluation, as ``hpcgpt.training.evaluation`` does."""
        log = self._log
        log.phase("evaluation")
        with self.model.evaluating() as gpt, torch.no_grad(), log.within("activations"), self._precision():
            gpt.eval()
            inputs, targets = to_inputs_and_targets(self._batch(), CPU)
            gpt(inputs, targets)

    def saved_bytes(self) -> int:
        """Return the bytes of a checkpoint's tensors, of all ranks together."""
        found = 0
        for parameter in self.model.gpt.parameters():
            state = self.optimizer.state[parameter].values()
            # The size of a sharded tensor is that of all its rows.
            found += sum(tensor.numel() * tensor.itemsize for tensor in (parameter, *state))
        return found

    def _batch(self) -> Tensor:
        config = self._request.config
        with self._log.within("other"):
            return torch.zeros(config.train.micro_batch, config.model.block_size + 1, dtype=torch.int32)

    def _before_optimizer(self) -> None:
        for parameter in self.model.gpt.parameters():
            self._log.label(parameter.grad, "gradients")
        self._log.scope = "optimizer"

    def _after_optimizer(self) -> None:
        self._log.scope = "activations"


def _model(request: Request, ranks: Ranks, dtype: torch.dtype) -> GPT:
    config, before = request.config, torch.get_default_dtype()
    # GPT.double() and .to() exchange tensors, which torch does not support for fake ones.
    torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        with torch.device("meta") if shards_weights(ranks, config.parallel) else nullcontext():
            gpt = GPT(config.model, config.run.seed, _options(request))
    finally:
        torch.set_default_dtype(before)
    gpt.to = lambda *_: gpt  # type: ignore[method-assign]
    return gpt


def _options(request: Request) -> ForwardOptions:
    """Return the options of the forward pass on the device of the run, as this CPU can follow them.

    On a GPU attention is a kernel that keeps no scores, also with document masking: `naive_attention` and dense masks
    are for CPUs.
    """
    options = ForwardOptions.from_config(request.config, end_of_text=0)
    if request.on_cpu:
        return options
    return ForwardOptions(None, options.loss_chunk, options.z_loss, options.recompute, "flash")


def _logged_loss(mean_loss: Callable[..., Tensor], log: StorageLog) -> Callable[..., Tensor]:
    """Return the loss function, such that the log attributes what it allocates to the logits, in both passes."""

    def scope(name: str) -> Callable[[Tensor], None]:
        def switch(_gradient: Tensor) -> None:
            log.scope = name

        return switch

    def logged(hidden: Tensor, *rest: Any, **options: Any) -> Tensor:
        with log.within("logits"):
            loss = mean_loss(hidden, *rest, **options)
        if loss.requires_grad:
            loss.register_hook(scope("logits"))  # type: ignore[no-untyped-call] # the backward pass begins here,
            hidden.register_hook(scope("activations"))  # type: ignore[no-untyped-call] # and has passed the head here
        return loss

    return logged


@dataclass
class _Bucketed(ParallelModel):
    """A model whose gradients are in buckets, like those of DistributedDataParallel."""

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


def _parallel(gpt: GPT, ranks: Ranks, config: Config, dtype: torch.dtype, log: StorageLog) -> ParallelModel:
    settings = config.parallel
    if ranks.cpu_group is None or settings.mode != "ddp":
        return parallelize(gpt, ranks, settings, seed=config.run.seed, compiled=False, dtype=dtype)
    with log.within("gradients"):
        bucket: list[torch.nn.Parameter] = []
        limit = FIRST_BUCKET_BYTES
        for parameter in reversed(list(gpt.parameters())):
            bucket.append(parameter)
            if sum(held.nbytes for held in bucket) >= limit:
                _fill(bucket)
                bucket, limit = [], BUCKET_BYTES
        _fill(bucket)
    return _Bucketed(gpt, gpt, CPU)


def _fill(bucket: list[torch.nn.Parameter]) -> None:
    """Make the gradients of `bucket` views of one tensor."""
    if not bucket:
        return
    flat = torch.zeros(sum(parameter.numel() for parameter in bucket), dtype=bucket[0].dtype)
    for parameter, part in zip(bucket, torch.split(flat, [parameter.numel() for parameter in bucket]), strict=True):
        parameter.grad = part.view_as(parameter)


def _moments(log: StorageLog, framework_bytes: int) -> list[Moment]:
    """Return the fullest moment of each phase."""
    ends = [place for place, _ in log.marks[1:]] + [len(log.changes)]
    held = dict.fromkeys(PARTS, 0)
    found, total = [], 0
    for (start, phase), end in zip(log.marks, ends, strict=True):
        most, at_most = total, dict(held)
        for number, change in log.changes[start:end]:
            held[log.holds[number]] += change
            total += change
            if total > most:
                most, at_most = total, dict(held)
        found.append(Moment(phase, at_most | {"framework": framework_bytes}))
    return found


def _with_copy(moment: Moment, copied: int) -> Moment:
    return Moment("save", moment.parts | {"other": moment.parts["other"] + copied})


def _remarks(request: Request, config: Config) -> Iterator[str]:
    if request.on_cpu:
        yield "a process on a CPU keeps what it frees, with gaps: 20 to 70 % more was measured, see docs/estimate.md"
        return
    if config.train.compile != "off":
        yield "counted without torch.compile, which usually needs less"
    if config.train.attention == "math":
        yield "train.attention math keeps all scores, which are not counted"
    if config.train.deterministic:
        yield "train.deterministic takes buffers of its own in backward passes, which are not counted"
    if config.model.dropout:
        yield "dropout masks of the attention kernel are not counted"
