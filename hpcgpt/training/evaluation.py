"""Validation: the loss over the validation split, divided among the ranks.

The windows are spread evenly over the split, and are the same for any number of ranks: batch b is evaluated by rank b
mod R, and sums are float64. Dropout, z-loss and gradients are off, and no random generator is used.

Bits per byte compare models with different tokenizers: the loss of all targets, end-of-text tokens included, in bits,
divided by the bytes of the text that the targets encode.

With eval.train_batches, windows of the training split are evaluated in the same way: their loss, ``eval/train_loss``,
differs from the training loss of the step by dropout, z-loss and samples, and can be compared with the validation loss.

With eval.tasks, the model is also evaluated on those tasks every eval.tasks_every steps: ``eval/TASK/accuracy`` and so
on (``hpcgpt.tasks.scores``).

Of a mix of data sets, each one that has a validation split is evaluated separately, and the figures are the means with
the weights of the mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpcgpt.data.loader import Windows
from hpcgpt.distributed.collectives import merge_on_all
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.model.precision import computing_in
from hpcgpt.plan import Plan
from hpcgpt.tasks import evaluation as task_evaluation
from hpcgpt.tasks.likelihood import Computation
from hpcgpt.tokenizer.interface import Tokenizer
from hpcgpt.training.parallel import ParallelModel
from hpcgpt.training.step import to_inputs_and_targets

Precision = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class ValidationSet:
    """The validation windows of one data set, and its weight in the mix."""

    name: str
    windows: Windows
    weight: int


@dataclass(frozen=True)
class EvalContext:
    """How to evaluate: `batches` batches of `micro_batch` windows; 0: the whole split.

    `bytes_per_token` (V,): see the function of this name. `stopped` is called by all ranks together before each round,
    in which each rank evaluates one batch; if it returns True, the evaluation ends without a result. `in_step`: see
    `hpcgpt.training.parallel.ParallelModel`.
    """

    batches: int
    micro_batch: int
    bytes_per_token: NDArray[np.int64]
    ranks: Ranks
    precision: Precision = nullcontext
    stopped: Callable[[], bool] = lambda: False
    in_step: bool = False

    def count(self, windows: Windows) -> int:
        """Return how many of `windows` are evaluated."""
        return windows.count if self.batches == 0 else min(windows.count, self.batches * self.micro_batch)


class Evaluator:
    """Evaluates the model while it trains: on the validation split, and on what else the options of [eval] name."""

    def __init__(
        self, planned: Plan, ranks: Ranks, tokenizer: Tokenizer, precision: Precision, dtype: torch.dtype
    ) -> None:
        """Open the sets.

        `precision` is for windows like those of training. Questions are of any length, which some attention kernels
        cannot process, so these are computed in `dtype`, as by ``hpcgpt eval --tasks``.
        """
        settings = planned.config
        self._config, self._total_steps, self._dtype = settings, planned.total_steps, dtype
        self._validation, self._training = validation_sets(planned), training_sets(planned)
        self._tasks = planned.tasks
        self._context = EvalContext(
            settings.eval.batches,
            settings.train.micro_batch,
            bytes_per_token(tokenizer, settings.model.vocab_size),
            ranks,
            precision,
        )

    def evaluate(self, model: ParallelModel, step: int, stopped: Callable[[], bool]) -> dict[str, float | None] | None:
        """Return the figures after `step` steps; None if `stopped` returned True before they were complete.

        A collective.
        """
        context = replace(self._context, stopped=stopped, in_step=model.in_step)
        with model.evaluating() as gpt:
            of_validation = evaluate_all(gpt, self._validation, context)
            if of_validation is None:
                return None
            of_training = training_loss(gpt, self._training, replace(context, batches=self._config.eval.train_batches))
            if of_training is None:
                return None
            of_tasks = self._of_tasks(gpt, step, context)
        return None if of_tasks is None else {**of_validation, **of_training, **of_tasks}

    def _of_tasks(self, gpt: GPT, step: int, context: EvalContext) -> dict[str, float | None] | None:
        if not self._tasks or (step % self._config.eval.tasks_every and step != self._total_steps):
            return {}
        how = Computation(
            context.micro_batch,
            context.ranks,
            lambda: computing_in(self._dtype, context.ranks.device),
            context.stopped,
            context.in_step,
        )
        return task_evaluation.metrics(gpt, self._tasks, how)


def validation_sets(planned: Plan) -> list[ValidationSet]:
    """Return the validation sets of a run. Their windows do not overlap, whatever data.stride is."""
    block_size, vocab_size = planned.config.model.block_size, planned.config.model.vocab_size
    return [
        ValidationSet(part.name, Windows(part.val, block_size, block_size, vocab_size), part.samples_per_block)
        for part in planned.sets
        if part.val
    ]


def training_sets(planned: Plan) -> list[ValidationSet]:
    """Return the training split in the same form; no sets without eval.train_batches."""
    if not planned.config.eval.train_batches:
        return []
    block_size, vocab_size = planned.config.model.block_size, planned.config.model.vocab_size
    return [
        ValidationSet(part.name, Windows(part.train, block_size, block_size, vocab_size), part.samples_per_block)
        for part in planned.sets
    ]


def training_loss(model: nn.Module, sets: Sequence[ValidationSet], context: EvalContext) -> dict[str, float] | None:
    """Return the loss of the training split, ``eval/train_loss``; {} without sets, None if `context.stopped` ended it.

    A collective.
    """
    if not sets:
        return {}
    figures = evaluate_all(model, sets, context)
    return None if figures is None else {"eval/train_loss": figures["val/loss"]}


def bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> NDArray[np.int64]:
    """Return the bytes of text of each id (vocab_size,): 0 for special tokens and for ids beyond the tokenizer's."""
    found = np.zeros(vocab_size, dtype=np.int64)
    found[: tokenizer.vocab_size] = tokenizer.token_bytes
    return found


def evaluate_all(model: nn.Module, sets: Sequence[ValidationSet], context: EvalContext) -> dict[str, float] | None:
    """Evaluate one or several validation sets; see `evaluate`. Several have a ``val/loss/NAME`` each as well."""
    found = []
    for part in sets:
        figures = evaluate(model, part.windows, context)
        if figures is None:
            return None
        found.append(figures)
    return found[0] if len(found) == 1 else combine(sets, found)


def combine(sets: Sequence[ValidationSet], found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the figures of a mix from those of its data sets."""
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
def evaluate(model: nn.Module, windows: Windows, context: EvalContext) -> dict[str, float] | None:
    """Return the ``val/...`` figures, the same on every rank; None if `context.stopped` ended it. A collective."""
    micro_batch, ranks, count = context.micro_batch, context.ranks, context.count(windows)
    chosen = np.arange(count) * windows.count // count
    batches = [chosen[i : i + micro_batch] for i in range(0, count, micro_batch)]
    # loss in nats, targets, bytes of text
    sums = torch.zeros(3, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), ranks.world.size):
            if context.stopped():
                return None
            number = first + ranks.world.rank
            if number < len(batches):
                sums += _batch_sums(model, windows, batches[number], context)
            elif context.in_step:  # the others need this rank's weights
                _batch_sums(model, windows, batches[-1], context)
    finally:
        model.train(training)
    nats, targets, text_bytes = merge_on_all(ranks, lambda: sums, torch.add).tolist()
    loss = nats / targets
    return {
        "val/loss": loss,
        "val/perplexity": _perplexity(loss),
        "val/bits_per_byte": nats / math.log(2) / text_bytes,
    }


def _batch_sums(model: nn.Module, windows: Windows, numbers: NDArray[np.int64], context: EvalContext) -> Tensor:
    """Return loss in nats, targets and bytes of text of the windows with these `numbers`: (3,) float64."""
    batch = windows.read(numbers)
    inputs, targets = to_inputs_and_targets(batch, context.ranks.device)
    with context.precision():
        loss = model(inputs, targets)
    ids = batch.numpy()
    text_bytes = int(context.bytes_per_token[ids.view(f"u{ids.itemsize}")[:, 1:]].sum())
    return torch.tensor([float(loss) * targets.numel(), targets.numel(), text_bytes], dtype=torch.float64)


def _perplexity(loss: float) -> float:
    """Return the perplexity, limited so that it is finite."""
    return math.exp(min(loss, 700.0))
