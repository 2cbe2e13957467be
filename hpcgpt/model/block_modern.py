"""The parts of the modern block: RMSNorm, attention with rotary positions, grouped queries and norms on queries and
keys, SwiGLU; no biases.

Shapes: B batch, T time, C channels (n_embd), H heads, K key-value heads, D head size (C / H), F hidden width.

Sources, a change from GPT-2's block each:

* RMSNorm: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
* rotary positions: Su et al., "RoFormer", 2021.
* SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020.
* norms on queries and keys: Henry et al., "Query-Key Normalization for Transformers", 2020; with gains, as in
  Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023.
* grouped queries: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.

Put together they are the block of Qwen3 (Yang et al., 2025), whose layout of rotary pairs is used.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcgpt.config.options import Model
from hpcgpt.model.attention import Sight, attend
from hpcgpt.model.kv_cache import Memory

ROTARY_BASE = 10_000.0
EPSILON = 1e-6
# The hidden width comes in multiples of this, for the matrix units' sake.
WIDTH_MULTIPLE = 64


class Norm(nn.Module):
    """x / rms(x), times a gain a channel; the mean of squares is taken in float32 at least."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # Torch has no fused kernel for bfloat16 with gains in float32, which autocast would make of it.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPSILON)


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.groups = config.n_head, config.n_kv_head or config.n_head
        size = config.n_embd // config.n_head
        self.qkv = nn.Linear(config.n_embd, (self.heads + 2 * self.groups) * size, bias=False)
        self.query_norm, self.key_norm = Norm(size), Norm(size)
        self.residual = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor, sight: Sight, memory: Memory | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)  # (B, H, T, D), (B, K, T, D) twice
        assert sight.rotation is not None
        q, k = turned(self.query_norm(q), sight.rotation), turned(self.key_norm(k), sight.rotation)
        if memory is not None:
            k, v = memory.extend(k, v)  # (B, K, S, D)
        mixed = attend(q, k, v, sight, self.dropout if self.training else 0.0)  # (B, H, T, D)
        out: Tensor = self.residual(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        # Three matrices of 8/3 C have the weights of GPT-2's two of 4 C.
        width = math.ceil(8 * config.n_embd / 3 / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.gate_and_up = nn.Linear(config.n_embd, 2 * width, bias=False)
        self.residual = nn.Linear(width, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dropout(self.residual(F.silu(gate) * up))  # type: ignore[no-any-return]


def rotation(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles that heads of `size` turn by at `positions` (T,) or (B, T).

    float32, (T, D/2) or (B, 1, T, D/2): pair i turns by position / ROTARY_BASE^(2i / D).
    """
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size  # (D/2,)
    angles = positions.unsqueeze(-1) * (1.0 / ROTARY_BASE**steps)  # (..., T, D/2)
    if angles.dim() == 3:
        angles = angles.unsqueeze(1)  # (B, 1, T, D/2): the same for all heads
    return angles.cos(), angles.sin()


def turned(x: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:
    """`x` (B, H, T, D), its dimensions i and i + D/2 turned as a pair; computed in float32 at least."""
    cosine, sine = by
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
