"""Muon: orthogonalized momentum, for matrices.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/): the update U S V^T of a matrix, its gradient with Nesterov momentum, is
replaced by approximately U V^T, so that all directions have the same weight. Steps are longer by sqrt(rows / columns)
for tall matrices, and weight decay is AdamW's.

For float32 matrices the result is that of torch.optim.Muon (2.9 and later), bit for bit, where the hardware computes in
bfloat16. That one is not used because with sharded matrices it would communicate in each product of its iteration, and
round to bfloat16 before sending. Here the momentum stays sharded, each matrix is gathered once a step, and every rank
computes the same iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpcgpt.distributed.sharded_tensor import full_tensor, local_rows
from hpcgpt.optim.uncompiled import Optimizer

ITERATIONS = 5
# Of an odd polynomial of degree 5 that maps (0, 1] close to 1, small values in few iterations: Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


class Muon(Optimizer):
    """Muon for `matrices`, and the optimizer `others` for all other parameters, with common groups and state."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        others: torch.optim.Optimizer,
        cpus_have_bf16: bool,
    ) -> None:
        """`cpus_have_bf16`, the same on every rank: their updates of the same matrix must have the same bytes."""
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._matrices, self._others = self.param_groups[:], others
        self._cpus_have_bf16 = cpus_have_bf16
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters. A collective if matrices are sharded."""
        assert closure is None
        for group in self._matrices:
            for matrix in group["params"]:
                self._update(matrix, group["lr"], group["momentum"], group["weight_decay"])
        self._others.step()

    def _update(self, matrix: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        if matrix.grad is None:
            return
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        gradient = local_rows(matrix.grad).local
        mean = local_rows(state["momentum_buffer"]).local.lerp_(gradient, 1 - momentum)
        gradient.lerp_(mean, momentum)  # in place: the gradient is not needed any more
        update = orthogonal(full_tensor(matrix.grad), self._cpus_have_bf16)
        mine = local_rows(matrix)
        mine.local.mul_(1 - lr * weight_decay)
        rows, columns = matrix.shape
        mine.local.add_(update[mine.start : mine.stop], alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor, cpus_have_bf16: bool) -> Tensor:
    """Approximate U V^T of a matrix U S V^T (rows, columns), with singular values of about 0.7 to 1.2.

    Computed in bfloat16; in float32 on CPUs unless `cpus_have_bf16`, because one of them would emulate bfloat16 (13
    times slower for 192 x 576, with AVX2); in float64 if the matrix is float64, which is used to examine the effect of
    rounding.
    """
    a, b, c = COEFFICIENTS
    tall = len(matrix) > matrix.shape[1]
    emulated = matrix.device.type == "cpu" and not cpus_have_bf16
    x = matrix if emulated or matrix.dtype == torch.float64 else matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
