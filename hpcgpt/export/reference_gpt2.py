"""GPT-2's forward pass, written from its definition, over tensors with nanoGPT's names: for the check of exports that
no installed library reads.

Weights are read when they are needed. Independent of ``hpcgpt.model``, which it is compared with; the names of modules
that it reports are those of ours.

Shapes: B windows, T tokens, C channels, H heads, V ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.export.agreement import Forward
from hpcgpt.export.on_demand import Read, Watch


@dataclass(frozen=True)
class Shape:
    """What the tensors do not say."""

    layers: int
    heads: int
    vocab_size: int
    epsilon: float
    gelu: Literal["tanh", "exact"]


def shape_of(model: Model) -> Shape:
    return Shape(model.n_layer, model.n_head, model.vocab_size, model.epsilon, model.gelu)


def forward(shape: Shape, read: Read) -> Forward:
    """Return the forward pass of a model with a tied head. `read` returns a tensor by nanoGPT's name."""

    def tensor(name: str) -> Tensor:
        return read(f"transformer.{name}").double()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensor(f"{name}.weight").T + tensor(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        return centered / (variance + shape.epsilon).sqrt() * tensor(f"{name}.weight") + tensor(f"{name}.bias")

    def attention(x: Tensor, name: str) -> Tensor:
        windows, tokens, channels = x.shape
        size = channels // shape.heads
        fused = linear(x, f"{name}.c_attn").view(windows, tokens, 3, shape.heads, size)
        q, k, v = fused.permute(2, 0, 3, 1, 4)  # (B, H, T, C / H) each
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)  # (T, T)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(size)).masked_fill(future, -math.inf)  # (B, H, T, T)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(windows, tokens, channels)  # (B, T, C)
        return linear(mixed, f"{name}.c_proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(_gelu(linear(x, f"{name}.c_fc"), shape.gelu), f"{name}.c_proj")

    def run(ids: Tensor, watch: Watch) -> Tensor:
        def seen(name: str, output: Tensor) -> Tensor:
            watch(name, output)
            return output

        x = seen("token_embedding", tensor("wte.weight")[ids])  # (B, T, C)
        x = x + seen("position_embedding", tensor("wpe.weight")[: ids.shape[1]])
        for number in range(shape.layers):
            ours, theirs = f"blocks.{number}", f"h.{number}"
            normed = seen(f"{ours}.attention_norm", norm(x, f"{theirs}.ln_1"))
            x = x + seen(f"{ours}.attention", attention(normed, f"{theirs}.attn"))
            normed = seen(f"{ours}.mlp_norm", norm(x, f"{theirs}.ln_2"))
            x = x + seen(f"{ours}.mlp", mlp(normed, f"{theirs}.mlp"))
        x = seen("norm", norm(x, "ln_f"))
        return seen("head", x @ tensor("wte.weight")[: shape.vocab_size].T)  # (B, T, V)

    return run


def _gelu(x: Tensor, form: Literal["tanh", "exact"]) -> Tensor:
    if form == "exact":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
