"""Muon: momentum, made orthogonal, for matrices.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon/): the update U S V^T of a matrix of gradients, with Nesterov's momentum, is
replaced by something near to U V^T, so that all directions count alike. Steps are longer by sqrt(rows / columns) for
tall matrices, and weights decay as AdamW's do.

In float32 its numbers are those of torch.optim.Muon (2.9 and later), bit for bit. Why not that one: where ranks have
shares of the rows of a matrix, its iteration would send something in each of its products, and round in bfloat16 on the
way. Here the momentum is kept in shares, each matrix is gathered once a step, and every rank does the same iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hpcgpt.distributed.sharded_tensor import held, whole

ITERATIONS = 5
# Of an odd polynomial of degree 5 that sends all of (0, 1] near to 1, small values fast: Jordan et al.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """`matrices` by Muon, and the parameters of `others` by that optimizer, as one: groups and state are common."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        others: torch.optim.Optimizer,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._matrices, self._others = self.param_groups[:], others
        self.param_groups += others.param_groups
        others.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """All gradients have to be there. A collective where ranks have shares of the matrices."""
        assert closure is None
        for group in self._matrices:
            for matrix in group["params"]:
                self._move(matrix, group["lr"], group["momentum"], group["weight_decay"])
        self._others.step()

    def _move(self, matrix: Tensor, lr: float, momentum: float, weight_decay: float) -> None:
        if matrix.grad is None:
            return
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        gradient = held(matrix.grad).local
        mean = held(state["momentum_buffer"]).local.lerp_(gradient, 1 - momentum)
        gradient.lerp_(mean, momentum)  # in place: nobody needs it any more
        update = orthogonal(whole(matrix.grad))
        own = held(matrix)
        own.local.mul_(1 - lr * weight_decay)
        rows, columns = matrix.shape
        own.local.add_(update[own.first : own.after], alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Near to U V^T of a matrix U S V^T (rows, columns), singular values of about 0.7 to 1.2: in bfloat16, but of a
    float64 matrix in float64, which somebody chose to see what rounding does.
    """
    a, b, c = COEFFICIENTS
    tall = len(matrix) > matrix.shape[1]
    x = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
