"""Model, optimizer and batches of this rank: launches optimizer steps, and reads their metrics.

A step is launched first, and its metrics are read later. On a GPU (`defers_metrics`) it is best to read them after the
next step has been launched, so that the device never waits for the host. There the loss and the votes of a step are
reduced just before the next one is launched: as late as possible without a wait, so that the votes are new.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hpcgpt.data.loader import Loader, Mixture, Windows
from hpcgpt.data.prefetch import Prefetcher
from hpcgpt.distributed.collectives import distinct_on_all
from hpcgpt.distributed.device_clock import DeviceClock
from hpcgpt.distributed.stop_signals import shielded
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.precision import allow_tf32, computing_in, cpu_has_bf16, pick_dtype
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.output import streams
from hpcgpt.plan import Plan
from hpcgpt.run import metrics_file
from hpcgpt.training import spikes
from hpcgpt.training.parallel import parallelize, shards_weights
from hpcgpt.training.step import StepResult, Votes, accumulate, totals, train_step
from hpcgpt.training.stragglers import LocalTime


@dataclass
class PendingStep:
    """A step that has been launched. `step` and `batch`, the number of its global batch, are counted from 0.

    `began` and `ended` are the clock marks before and after it. `votes` returns those of this rank. Once the ranks have
    reduced them, `figures` are loss, norm and the sums of all votes (2 + V,) float64 in host memory, valid once the
    device has passed the mark `known`.
    """

    step: int
    batch: int
    rate: float
    result: StepResult
    votes: Votes
    waited_s: float
    began: Any
    ended: Any = None
    figures: Tensor = field(init=False)
    known: Any = None


class Engine:
    """The model, optimizer and batches of this rank."""

    def __init__(self, planned: Plan, ranks: Ranks, local: LocalTime | None = None) -> None:
        """Make a model with its initial weights, not warmed up yet. A collective.

        Raises:
            UserError: the ranks would compute in different precisions.
        """
        self._plan, self._ranks, self._local = planned, ranks, local
        self._config = settings = planned.config
        self._on_gpu = self.defers_metrics = ranks.device.type == "cuda"
        self._clock = DeviceClock(ranks.device)
        self.dtype = pick_dtype(settings.train.dtype, ranks.device)
        found = distinct_on_all(ranks, lambda: (str(self.dtype), not self._on_gpu and cpu_has_bf16()))
        if len(dtypes := {dtype for dtype, _ in found}) > 1:
            raise UserError(f"the ranks would compute in {' and '.join(sorted(dtypes))}: set train.dtype")
        self.cpus_have_bf16 = {has_bf16 for _, has_bf16 in found}  # of all ranks
        # Only bf16 peaks are known.
        measured = self._on_gpu and self.dtype == torch.bfloat16
        self._peak_flops = metrics_file.peak_flops(torch.cuda.get_device_name(ranks.device)) if measured else None
        allow_tf32(ranks.device)
        options = ForwardOptions.from_config(settings, planned.sets[0].manifest.tokenizer["end_of_text"])
        # Sharded weights are drawn by `parallelize`, tensor by tensor.
        with torch.device("meta") if shards_weights(ranks, settings.parallel) else nullcontext():
            gpt = GPT(settings.model, settings.run.seed, options)
        if self.dtype == torch.float64:
            gpt.double()
        self._flops_per_token = gpt.flops_per_token()
        self._kernels = kernels.attention(settings.train.attention, ranks.device, self.dtype)
        if settings.train.deterministic:
            self._kernels = kernels.deterministic(self._kernels, ranks.device)
        # Compiled on all ranks or on none, so that all compute alike; flex attention, too.
        kind: Literal["cpu", "cuda"] = "cuda" if self._on_gpu else "cpu"
        lacking = set().union(*distinct_on_all(ranks, lambda: kernels.lacks_to_compile(kind)))
        self.compiled = kernels.compiles(settings.train.compile, ranks.device, lacking)
        if self._on_gpu:
            gpt.can_use_flex = not lacking
            if lacking and (settings.train.compile != "off" or settings.data.document_mask) and ranks.world.is_first:
                streams.warn(f"nothing is compiled, which is slower: a host lacks {', '.join(sorted(lacking))}")
        self.model = parallelize(
            gpt, ranks, settings.parallel, seed=settings.run.seed, compiled=self.compiled, dtype=self.dtype
        )
        self.optimizer = make_optimizer(self.model.gpt, settings.optim, all(self.cpus_have_bf16))
        self.loader = _loader(planned, ranks)
        self._prefetcher = Prefetcher(self.loader.batch, planned.micro_steps, ranks.device)
        self._unreduced: PendingStep | None = None

    def warm_up(self) -> None:
        """Run one forward and backward pass whose gradients are discarded. The model is compiled here, too.

        DDP rearranges its buckets after the first backward pass, which decides the order in which floats are added.
        Without this pass, the first step after a resume would round differently from the same step of a run that was
        not interrupted.
        """
        self.model.module.train()
        # The compiler's worker processes must not die of Slurm's signals. Flex attention is always compiled.
        with shielded() if self.compiled or self._on_gpu else nullcontext(), self._kernels():
            accumulate(self.model, self._prefetcher.batches(0, 1), micro_steps=1, precision=self.precision)
        self.model.clear_gradients(self.optimizer)
        self._prefetcher.waited_s()

    def launch(self, step: int, batch: int, votes: Votes = tuple) -> PendingStep:
        """Launch optimizer step number `step` on global batch `batch`. A collective.

        `votes` is called when the loss of this step is reduced: here, or with `defers_metrics` at the next launch (but
        with train.on_nonfinite skip always here).
        """
        settings = self._config
        self._reduce()
        began = self._clock.mark()
        rate = learning_rate(step, self._plan.total_steps, settings)
        with self._kernels():  # around the backward pass too: activation checkpointing repeats the forward pass in it
            result = train_step(
                self.model,
                self.optimizer,
                self._prefetcher.batches(batch),
                micro_steps=self._plan.micro_steps,
                rate=rate,
                clip_norm=settings.optim.clip_norm,
                precision=self.precision,
                ranks=self._ranks,
                local=self._local,
                skip_nonfinite=settings.train.on_nonfinite == "skip",
                votes=votes,
            )
        pending_step = PendingStep(step, batch, rate, result, votes, self._prefetcher.waited_s(), began)
        self._unreduced = pending_step
        if not self.defers_metrics:
            self._reduce()
        pending_step.ended = self._clock.mark()
        return pending_step

    def read(self, pending_step: PendingStep) -> dict[str, Any]:
        """Wait for the end of a step; return its row for metrics.jsonl. A collective, unless another step was launched.

        A loss or norm that is not finite is None, because JSON has no such numbers.
        """
        if pending_step is self._unreduced:
            self._reduce()
        # Not `.item()`, which would wait for everything launched so far: for the next step, too.
        self._clock.wait_for(pending_step.known)
        loss, norm, *_ = pending_step.figures.tolist()
        elapsed_s = self._clock.between_s(pending_step.began, pending_step.ended)
        tokens_per_s = self._plan.tokens_per_step / elapsed_s
        steps = pending_step.step + 1
        row = {
            "step": steps,
            "tokens": steps * self._plan.tokens_per_step,
            "samples": steps * self._config.train.global_batch,
            "time": time.time(),
            "train/loss": loss,
            "train/lr": pending_step.rate,
            "train/grad_norm": norm,
            "train/tokens_per_s": tokens_per_s,
            "train/step_s": elapsed_s,
            "train/data_wait_s": pending_step.waited_s,
        }
        if pending_step.result.skipped:
            row["train/skipped"] = True
        if self._on_gpu:
            row["train/memory_bytes"] = torch.cuda.max_memory_allocated(self._ranks.device)
        if self._peak_flops:
            achieved = tokens_per_s * self._flops_per_token / self._ranks.world.size
            row["train/mfu"] = achieved / self._peak_flops
        return metrics_file.finite(row)

    def locate_nonfinite(self, pending_step: PendingStep) -> str:
        """Return a message that names the batches that made this step's loss not finite. A collective."""
        return spikes.locate_nonfinite(pending_step.result.micro_losses, pending_step.batch, self.loader, self._ranks)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Set the dtype and the kernels of the forward passes inside."""
        with computing_in(self.dtype, self._ranks.device), self._kernels():
            yield

    def _reduce(self) -> None:
        """Reduce loss and votes of the step that was launched last, unless that is done. A collective."""
        pending_step, self._unreduced = self._unreduced, None
        if pending_step is None:
            return
        result, shared = pending_step.result, pending_step.result.totals
        if shared is None:
            shared = totals(result.micro_losses, pending_step.votes(), self._ranks)
        figures = torch.cat([shared[:1].double(), result.norm.double().reshape(1), shared[1:].double()])
        pending_step.figures = self._to_host(figures)
        pending_step.known = self._clock.mark()

    def _to_host(self, figures: Tensor) -> Tensor:
        if not self._on_gpu:
            return figures
        pinned = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        return pinned.copy_(figures, non_blocking=True)


def _loader(planned: Plan, ranks: Ranks) -> Loader:
    """Make the loader of this rank's training batches."""
    settings = planned.config
    block_size, vocab_size = settings.model.block_size, settings.model.vocab_size
    return Loader(
        mixture=Mixture(
            [Windows(part.train, block_size, settings.stride, vocab_size) for part in planned.sets],
            [part.samples_per_block for part in planned.sets],
        ),
        seed=settings.run.seed,
        rank=ranks.world.rank,
        world_size=ranks.world.size,
        global_batch=settings.train.global_batch,
        micro_batch=settings.train.micro_batch,
    )
