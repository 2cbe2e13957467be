"""Compares an export with the run: logits in float64 on the same ids; where they part, the first module that differs.

Both sides have the same weights, as they are in the files of the export: float32, or rounded to bfloat16. All
arithmetic is float64, so agreement means the same function, and not just similar numbers: a wrong epsilon or another
form of GELU is far above the tolerance.

Shapes: B windows, T tokens, C channels, V ids of the true vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import tensor_names
from hpcgpt.export.on_demand import Read, Watch, read_on_demand, watched, without_memory_for_parameters
from hpcgpt.model.gpt import GPT

# The largest difference, as a fraction of the largest value: far above rounding in float64, far below any mistake.
TOLERANCE = 1e-10
# Returns the logits (B, T, V) of ids (B, T), and calls `Watch` with each module's output, by its name at ours.
Forward = Callable[[Tensor, Watch], Tensor]


class DisagreementError(Exception):
    """An export does not compute what the run does; the message names the first module that differs."""


@dataclass(frozen=True)
class Agreement:
    """The largest difference of logits, and the largest logit."""

    difference: float
    largest: float


def ours(config: Model, read: Read) -> Forward:
    """Return the forward pass of a model of ours that reads its weights, (outputs, inputs), one by one.

    Attention spans the window, whatever data.document_mask is: other programs have no such mask.
    """
    with without_memory_for_parameters():
        model = GPT(config).eval()
    read_on_demand(model, read)
    names = {name: name for name in _module_names(config)}
    head = "token_embedding.weight" if config.tied else "head.weight"

    def forward(ids: Tensor, watch: Watch) -> Tensor:
        with watched(model, names, watch):
            hidden = model.hidden(ids)  # (B, T, C)
        logits = F.linear(hidden, read(head)[: config.vocab_size].to(hidden.dtype))  # (B, T, V)
        watch("head", logits)
        return logits

    return forward


def compare(own: Forward, other: Forward, ids: Tensor, config: Model) -> Agreement:
    """Compare two forward passes on `ids` (B, T).

    Raises:
        DisagreementError: they differ.
        UserError: our own logits are not finite.
    """
    with torch.no_grad():
        expected = own(ids, _ignore)
        if not torch.isfinite(expected).all():
            raise UserError(
                "the logits that hpcgpt itself computes from these weights are not finite, so there is nothing to "
                "compare: the training has diverged, or the weights were damaged before. Choose an earlier checkpoint"
            )
        found = other(ids, _ignore)
        if expected.shape != found.shape:
            raise DisagreementError(
                f"it has logits for {found.shape[-1]:,} ids, and the vocabulary of the run has {expected.shape[-1]:,}"
            )
        largest = _largest(expected)
        differences = found.sub_(expected).abs_().amax(dim=-1)  # (B, T)
        difference = float(differences.max())
        if _agree(difference, largest):
            return Agreement(difference, largest)
        apart = ~(differences <= TOLERANCE * max(1.0, largest))  # (B, T), True for NaN
        del expected, found
        token = int(apart.any(dim=0).nonzero()[0])
        window = int(apart[:, token].nonzero()[0])
        where = first_difference(own, other, ids[window : window + 1, : token + 1], config)
    raise DisagreementError(f"{where}; logits differ by up to {difference:.3g} (the largest is {largest:.3g})")


def first_difference(own: Forward, other: Forward, ids: Tensor, config: Model) -> str:
    """Return a sentence on the first module that differs at the last of `ids` (1, T)."""
    expected, found = _states(own, ids), _states(other, ids)
    target = tensor_names.architecture(config)
    for name, there in tensor_names.modules(config, target).items():
        if name not in found:
            return f"it lacks the module {name} ({there})"
        if expected[name].shape != found[name].shape:
            return f"the module {name} ({there}) has {len(found[name])} values a token, expected {len(expected[name])}"
        difference = float((expected[name] - found[name]).abs().max())
        if not _agree(difference, _largest(expected[name])):
            return (
                f"they part at the module {name} ({there}), by {difference:.3g} at token {ids.shape[1]} of a window "
                f"(its largest value is {_largest(expected[name]):.3g})"
            )
    return "all modules agree at the token where the logits differ"


def loss(forward: Forward, ids: Tensor) -> float:
    """Return the mean loss, in nats, of predicting each of `ids` (B, T) but the first of each window."""
    with torch.no_grad():
        logits = forward(ids, _ignore)[:, :-1]  # (B, T - 1, V)
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def _states(forward: Forward, ids: Tensor) -> dict[str, Tensor]:
    """Return the output (C,) of each module at the last of `ids` (1, T)."""
    found: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        found[name] = output.reshape(-1, output.shape[-1])[-1].clone()

    forward(ids, keep)
    return found


def _module_names(config: Model) -> list[str]:
    return [name for name in tensor_names.modules(config, tensor_names.architecture(config)) if name != "head"]


def _agree(difference: float, largest: float) -> bool:
    return math.isfinite(difference) and difference <= TOLERANCE * max(1.0, largest)


def _largest(values: Tensor) -> float:
    return max(float(values.max()), -float(values.min()))


def _ignore(_name: str, _output: Tensor) -> None:
    pass


def losses(after: float, before: float, there: str = "") -> str:
    """Compare two losses in nats, with as many digits as they need to differ; `there`: where `after` holds."""
    if after == before:
        return f"the loss of these tokens is {after:.5f} nats {there}as well"
    digits = next((digits for digits in range(5, 17) if f"{after:.{digits}f}" != f"{before:.{digits}f}"), 17)
    return f"the loss of these tokens is {after:.{digits}f} nats {there}instead of {before:.{digits}f}"
