"""The parts of the modern block: RMSNorm, attention with rotary positions, grouped queries and norms on queries and
keys, SwiGLU.

Shapes: B batch, T time, C channels (n_embd), H heads, K key-value heads, D head size (C / H unless it is set), F hidden
width.

Sources, one for each change from GPT-2's block:

* RMSNorm: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
* rotary positions: Su et al., "RoFormer", 2021.
* SwiGLU: Shazeer, "GLU Variants Improve Transformer", 2020.
* norms on queries and keys: Henry et al., "Query-Key Normalization for Transformers", 2020; with gains, as in
  Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters", 2023.
* grouped queries: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.

Together they are the block of Qwen3 (Yang et al., 2025), whose layout of rotary pairs is used. Without the norms on
queries and keys it is Llama's (Touvron et al., 2023), and Qwen2's with biases of queries, keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcgpt.config.options import Model
from hpcgpt.model.attention import attend
from hpcgpt.model.attention_context import AttentionContext
from hpcgpt.model.kv_cache import LayerKVCache


class Norm(nn.Module):
    """RMSNorm: x / rms(x), times a gain for each channel; the mean of squares is computed in float32 or wider."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the gains would stay float32, and torch has no fused kernel for bfloat16 with float32 gains.
        # Since torch 2.12 autocast on a GPU returns float32: as keys they would take twice the memory in a KV cache.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads, self.groups, size = config.n_head, config.kv_heads, config.head_width
        self.qkv = nn.Linear(config.n_embd, (self.heads + 2 * self.groups) * size, bias=config.qkv_bias)
        self.query_norm = Norm(size, config.epsilon) if config.qk_norm else None
        self.key_norm = Norm(size, config.epsilon) if config.qk_norm else None
        self.residual = nn.Linear(self.heads * size, config.n_embd, bias=False)
        self.dropout = config.dropout

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerKVCache | None = None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (self.heads + 2 * self.groups, -1)).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)  # (B, H, T, D), (B, K, T, D) twice
        assert context.rope is not None
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, K, S, D)
        mixed = attend(q, k, v, context, self.dropout if self.training else 0.0)  # (B, H, T, D)
        out: Tensor = self.residual(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(config.n_embd, 2 * config.hidden_width, bias=False)
        self.residual = nn.Linear(config.hidden_width, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_and_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.dropout(self.residual(F.silu(gate) * up))  # type: ignore[no-any-return]


def apply_rope(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate dimensions i and i + D/2 of `x` (B, H, T, D) as a pair, in float32 or wider."""
    cosine, sine = cos_sin
    first, second = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
