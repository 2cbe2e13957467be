"""What makes the steps: the model as it is trained, its optimizer and its batches, on this rank.

A step is launched, and its figures are read afterwards. On a GPU `reads_late` is true: the figures of a step are best
read when the next one has been launched, so that the device never waits for the host to look.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcgpt.data.loader import Loader, Mixture, Windows
from hpcgpt.data.prefetch import Feed
from hpcgpt.distributed.collectives import on_all
from hpcgpt.distributed.device_clock import DeviceClock
from hpcgpt.distributed.stop_signals import shielded
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT, Manner
from hpcgpt.model.precision import allow_tf32, computing_in, pick_dtype
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.plan import Plan
from hpcgpt.run import metrics_file
from hpcgpt.training import parallel, spikes
from hpcgpt.training.step import Outcome, accumulate, train_step
from hpcgpt.training.stragglers import LocalTime


@dataclass(frozen=True)
class Launched:
    """A step under way. `step` counts from 0, as does `batch`, the number of its global batch.

    `figures` has the loss and the norm (2,) float64 in host memory, once the device has passed `ended`; `began` is
    another such mark of its time.
    """

    step: int
    batch: int
    rate: float
    outcome: Outcome
    figures: Tensor
    began: Any
    ended: Any
    waited_s: float


class Engine:
    def __init__(self, planned: Plan, ranks: Ranks, local: LocalTime | None = None) -> None:
        """A model with its first weights, not warmed up yet. A collective.

        Raises:
            UserError: the ranks would compute in different precisions.
        """
        self._plan, self._ranks, self._local = planned, ranks, local
        self._config = settings = planned.config
        self._on_gpu = self.reads_late = ranks.device.type == "cuda"
        self._clock = DeviceClock(ranks.device)
        self.dtype = pick_dtype(settings.train.dtype, ranks.device)
        dtypes = on_all(ranks, lambda: str(self.dtype))
        if len(set(dtypes)) > 1:
            raise UserError(f"the ranks would compute in {' and '.join(sorted(set(dtypes)))}: set train.dtype")
        # The table is of bf16 peaks.
        measured = self._on_gpu and self.dtype == torch.bfloat16
        self._peak_flops = metrics_file.peak_flops(torch.cuda.get_device_name(ranks.device)) if measured else None
        allow_tf32(ranks.device)
        manner = Manner.of(settings, planned.sets[0].manifest.tokenizer["end_of_text"])
        self.model = GPT(settings.model, settings.run.seed, manner)  # to look at: see `gathered`
        if self.dtype == torch.float64:
            self.model.double()
        self._attention = kernels.attention(settings.train.attention, ranks.device, self.dtype)
        # All or none: the ranks of a run compute alike.
        self.compiled = all(on_all(ranks, lambda: kernels.compiles(settings.train.compile, ranks.device)))
        # What is called to train, and what has this rank's part of the weights.
        self.forward, self.trained = parallel.shared_out(
            self.model, ranks, settings.parallel, self.compiled, self.dtype
        )
        self._is_gathered = False
        self.optimizer = make_optimizer(self.trained, settings.optim)
        context, size = settings.model.block_size, settings.model.vocab_size
        self.loader = Loader(
            Mixture(
                [Windows(part.train, context, settings.stride, size) for part in planned.sets],
                [part.quota for part in planned.sets],
            ),
            settings.run.seed,
            ranks.world.rank,
            ranks.world.size,
            settings.train.global_batch,
            settings.train.micro_batch,
        )
        self._feed = Feed(self.loader.batch, planned.micro_steps, ranks.device)

    def warm_up(self) -> None:
        """One pass whose gradients are thrown away.

        DDP orders its buckets anew after the first backward pass, and the order decides in which sequence
        floats are added. Without this pass the first step after a resume would round differently than
        the same step in a run that was never interrupted. Compilation happens here too.
        """
        self.forward.train()
        # The compiler's worker processes must not die of Slurm's warning.
        with shielded() if self.compiled else nullcontext(), self._attention():
            accumulate(self.forward, self._feed.batches(0, 1), 1, self.precision)
        parallel.clear_gradients(self.forward, self.optimizer)
        self._feed.waited_s()

    def launch(self, step: int, batch: int) -> Launched:
        """Begin optimizer step number `step` on global batch `batch`. A collective."""
        settings = self._config
        if self._is_gathered:
            parallel.release(self.model, self._ranks.device)
            self._is_gathered = False
        began = self._clock.mark()
        rate = learning_rate(step, self._plan.total_steps, settings)
        with self._attention():  # for backward, too, where activation checkpointing goes forward again
            outcome = train_step(
                self.forward,
                self.optimizer,
                self._feed.batches(batch),
                micro_steps=self._plan.micro_steps,
                rate=rate,
                clip_norm=settings.optim.clip_norm,
                precision=self.precision,
                ranks=self._ranks,
                local=self._local,
                skip_nonfinite=settings.train.on_nonfinite == "skip",
            )
        figures = self._to_host(torch.stack([outcome.loss.double(), outcome.norm.double()]))
        return Launched(step, batch, rate, outcome, figures, began, self._clock.mark(), self._feed.waited_s())

    def gathered(self) -> GPT:
        """The model with all its weights, until the next step is launched. A collective."""
        if self.trained is not self.model:
            parallel.gather(self.trained, self.model)
            self._is_gathered = True
        return self.model

    def read(self, launched: Launched) -> dict[str, Any]:
        """The figures of a step for metrics.jsonl, once it has ended: waits for that.

        Loss and norm are None where they are no finite numbers, for which JSON has no word.
        """
        # Not by `.item()`, which would wait for all that the device has been given by now: the next step, too.
        self._clock.wait_for(launched.ended)
        loss, norm = launched.figures.tolist()
        elapsed_s = self._clock.between_s(launched.began, launched.ended)
        tokens_per_s = self._plan.tokens_per_step / elapsed_s
        row = {
            "step": launched.step + 1,
            "tokens": (launched.step + 1) * self._plan.tokens_per_step,
            "samples": (launched.step + 1) * self._config.train.global_batch,
            "time": time.time(),
            "train/loss": loss,
            "train/lr": launched.rate,
            "train/grad_norm": norm,
            "train/tokens_per_s": tokens_per_s,
            "train/step_s": elapsed_s,
            "train/data_wait_s": launched.waited_s,
        }
        if launched.outcome.skipped:
            row["train/skipped"] = True
        if self._on_gpu:
            row["train/memory_bytes"] = torch.cuda.max_memory_allocated(self._ranks.device)
        if self._peak_flops:
            achieved = tokens_per_s * self.model.flops_per_token() / self._ranks.world.size
            row["train/mfu"] = achieved / self._peak_flops
        return metrics_file.finite(row)

    def blame(self, launched: Launched) -> str:
        """Whose batches made this step's loss no finite number, in words. A collective."""
        return spikes.blame(launched.outcome.own, launched.batch, self.loader, self._ranks)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Around each forward pass: what it computes in, and by which attention kernel."""
        with computing_in(self.dtype, self._ranks.device), self._attention():
            yield

    def _to_host(self, figures: Tensor) -> Tensor:
        if not self._on_gpu:
            return figures
        pinned = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        return pinned.copy_(figures, non_blocking=True)
