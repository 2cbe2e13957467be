"""The loss: mean cross-entropy over the target tokens, in nats.

The logits are the largest tensor of a small GPT: with 16 sequences of 1,024 tokens and 50,304 ids they take 3.3 GB in
float32, and their gradient as much again. In chunks, only one chunk's logits are in memory: their gradient is computed
right after their loss, in the forward pass, so that nothing is computed twice. The gradients of the hidden states
(N, C) and of the head (V, C) are in memory from then on, instead of from the backward pass on. The result changes by
rounding only.

Shapes: N targets, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, *, chunk: int = 0, z_loss: float = 0.0
) -> Tensor:
    """Return the mean loss () of `hidden` (N, C) over all `targets` (N,) int64, with the head `weight` (V, C).

    Computed for `chunk` targets at a time; 0: all at once. `bias` (V,) is constant: it has no gradient. `z_loss` times
    the mean square of the logits' log-sum-exp is added (Chowdhery et al., "PaLM", 2022, section 5), which keeps the
    logits from drifting.
    """
    count = len(targets)
    if chunk == 0 or chunk >= count:
        return _loss(_logits(hidden, weight, bias), targets, z_loss, "mean")
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _ChunkedLoss.apply(hidden, targets, weight, bias, chunk, z_loss)  # type: ignore[no-any-return, no-untyped-call]
    parts = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    return torch.stack([_loss(_logits(part, weight, bias), ids, z_loss, "sum") for part, ids in parts]).sum() / count


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits (N, V), float32 or float64."""
    logits = F.linear(hidden, weight, bias)
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _loss(logits: Tensor, targets: Tensor, z_loss: float, reduction: str) -> Tensor:
    if not z_loss:
        return F.cross_entropy(logits, targets, reduction=reduction)
    normaliser = logits.logsumexp(dim=-1)  # (N,)
    losses = normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1) + z_loss * normaliser.square()  # (N,)
    return losses.mean() if reduction == "mean" else losses.sum()


class _ChunkedLoss(torch.autograd.Function):
    """The mean loss, whose forward pass computes the gradients too, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, z_loss: float
    ) -> Tensor:
        ctx.dtypes, head_gradient = (hidden.dtype, weight.dtype), torch.zeros_like(weight)  # (V, C)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):  # cast once, and not for each product
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        sums = []
        chunks = zip(*(torch.split(tensor, chunk) for tensor in (hidden, targets, hidden_gradient)), strict=True)
        for part, ids, place in chunks:
            total, gradient = _sum_and_gradient(F.linear(part, weight, bias), ids, z_loss)
            sums.append(total)
            gradient = gradient.div_(len(targets)).to(hidden.dtype)  # (n, V), n of `chunk` or fewer targets
            place.copy_(gradient @ weight)
            head_gradient += gradient.T @ part
            del gradient  # or it would be in memory beside the next chunk's logits
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return torch.stack(sums).sum() / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        # In place: there is no memory for a second gradient of the head.
        of_hidden, of_head = (
            gradient.mul_(slope).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, None, of_head, None, None, None


def _sum_and_gradient(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses () and its gradient (N, V), both in float32 where `logits` are in bfloat16."""
    places = targets.unsqueeze(1)  # (N, 1)
    logs = logits.log_softmax(dim=-1, dtype=torch.float32 if logits.dtype == torch.bfloat16 else None)
    of_targets = logs.gather(1, places)
    total, normaliser = -of_targets.sum(), logits.gather(1, places) - of_targets
    gradient = logs.exp_()  # the probabilities
    if z_loss:
        total = total + z_loss * normaliser.square().sum()
        gradient *= 1 + 2 * z_loss * normaliser
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return total, gradient
