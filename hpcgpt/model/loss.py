"""The loss: mean cross-entropy over the target tokens, in nats.

The logits are the largest tensor of a small GPT: with 16 sequences of 1,024 tokens and 50,304 ids they take 3.3 GB in
float32, and their gradient as much again. In chunks, only one chunk's logits are in memory: they are computed, summed
and freed, and computed again in the backward pass. That costs one more product with the head, and changes the result
by rounding only.

Shapes: N targets, C channels, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def mean_loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, *, chunk: int = 0, z_loss: float = 0.0
) -> Tensor:
    """Return the mean loss () of `hidden` (N, C) over all `targets` (N,) int64, with the head `weight` (V, C).

    Computed for `chunk` targets at a time; 0: all at once. `z_loss` times the mean square of the logits' log-sum-exp
    is added (Chowdhery et al., "PaLM", 2022, section 5), which keeps the logits from drifting.
    """
    count = len(targets)
    if chunk == 0 or chunk >= count:
        return _loss(hidden, targets, weight, bias, z_loss, "mean")
    sums = [
        checkpoint(_loss, *part, weight, bias, z_loss, "sum", use_reentrant=False, preserve_rng_state=False)
        for part in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(sums).sum() / count


def _loss(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, z_loss: float, reduction: str
) -> Tensor:
    logits = F.linear(hidden, weight, bias)  # (N, V)
    if logits.dtype == torch.bfloat16:
        logits = logits.float()
    if not z_loss:
        return F.cross_entropy(logits, targets, reduction=reduction)
    normaliser = logits.logsumexp(dim=-1)  # (N,)
    losses = normaliser - logits.gather(1, targets.unsqueeze(1)).squeeze(1) + z_loss * normaliser.square()  # (N,)
    return losses.mean() if reduction == "mean" else losses.sum()
