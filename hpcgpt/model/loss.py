"""The loss: mean cross-entropy over the target tokens, in nats.

The logits are the largest tensor of a small GPT: with 16 sequences of 1,024 tokens and 50,304 ids they take 3.3 GB in
float32, and their gradient as much again. In chunks, only one chunk's logits are in memory: its gradients are computed
right after its loss, in the forward pass, so that nothing is computed twice. What stays until the backward pass is the
gradient of the hidden states and that of the head. The result changes by rounding only.

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
    if torch.is_grad_enabled():
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
        device, ctx.dtypes = hidden.device.type, (hidden.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        # What many chunks add is summed in float32, also where the head is in bfloat16.
        head_gradient = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))  # (V, C)
        sums, hidden_gradients = [], []
        for part, ids in zip(torch.split(hidden.to(dtype), chunk), torch.split(targets, chunk), strict=True):
            total, gradient = _sum_and_gradient(_logits(part, head, bias), ids, z_loss)
            gradient = gradient.div_(len(targets)).to(dtype)  # (n, V), n of `chunk` or fewer targets
            sums.append(total)
            hidden_gradients.append(gradient @ head)
            head_gradient += gradient.T @ part
        ctx.save_for_backward(torch.cat(hidden_gradients), head_gradient)
        return torch.stack(sums).sum() / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        of_hidden, of_head = (
            (slope * gradient).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return of_hidden, None, of_head, None, None, None


def _sum_and_gradient(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses () and its gradient (N, V), which takes the memory of `logits`."""
    normaliser = logits.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    total = (normaliser - logits.gather(1, targets.unsqueeze(1)) + z_loss * normaliser.square()).sum()
    gradient = logits.sub_(normaliser).exp_()  # the probabilities
    if z_loss:
        gradient *= 1 + 2 * z_loss * normaliser
    gradient[torch.arange(len(targets), device=targets.device), targets] -= 1
    return total, gradient
