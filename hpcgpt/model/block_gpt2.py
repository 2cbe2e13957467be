"""The parts of GPT-2's block: LayerNorm, attention, MLP with GELU, biases in all of them.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size (C / H), F hidden width (4 C unless it is set).

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm blocks, GELU in its tanh
form (nanoGPT has the exact one), LayerNorm epsilon 1e-5. Positions are learned, and added to the token embedding in
``hpcgpt.model.gpt``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hpcgpt.config.options import Model
from hpcgpt.model.attention import attend
from hpcgpt.model.attention_context import AttentionContext
from hpcgpt.model.kv_cache import LayerKVCache


class Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        # FSDP may gather parameters in bfloat16 while x is float32: CPUs have no kernel for that mix.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.residual = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerKVCache | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
        )
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, H, S, D)
        mixed = attend(q, k, v, context, self.dropout if self.training else 0.0)  # (B, H, T, D)
        out: Tensor = self.residual(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.hidden_width)
        self.residual = nn.Linear(config.hidden_width, config.n_embd)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x), approximate=self.approximate)  # (B, T, F)
        return self.dropout(self.residual(hidden))  # type: ignore[no-any-return]
