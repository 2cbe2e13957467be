"""The GPT, top-down: GPT -> Block -> Attention, MLP.

Shapes: B batch, T time, C channels (n_embd), H heads, D head size (C / H), V vocabulary.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm blocks,
learned positions, GELU in its tanh form, LayerNorm epsilon 1e-5, and an initialisation that shrinks the
two projections that write into the residual stream by sqrt(2 n_layer).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpcgpt.config import Model

# Rows of the embedding come in multiples of this: matrix units are slow on odd sizes, 50,257 most of all.
VOCAB_MULTIPLE = 64


class GPT(nn.Module):
    def __init__(self, config: Model, seed: int = 0) -> None:
        """A model with `config.vocab_size` ids, its weights drawn on the CPU from `seed` alone."""
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token_embedding = nn.Embedding(rows, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        residual_std = std / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:  # the gains of norms, and biases
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("residual.weight"):
                parameter.normal_(0.0, residual_std, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of `ids` (B, T) int64, or the mean loss in nats over `targets` (B, T)."""
        logits = self.padded_logits(ids)  # (B, T, V padded)
        if targets is None:
            return logits[..., : self.config.vocab_size]  # (B, T, V)
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # ()

    def padded_logits(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.head.weight, self._padding_bias())  # (B, T, V padded)

    def _padding_bias(self) -> Tensor | None:
        """Minus infinity for the rows beyond the vocabulary (V padded): they never win, and get no gradient.

        As the bias of the matrix product it costs nothing. Not a buffer: DDP would send it around.
        """
        weight = self.head.weight
        if len(weight) == self.config.vocab_size:
            return None
        bias = torch.zeros(len(weight), device=weight.device, dtype=weight.dtype)
        bias[self.config.vocab_size :] = -math.inf
        return bias

    def parameter_count(self) -> int:
        """Parameters that the model can use: without the padding rows, a tied head counted once."""
        padding = self.token_embedding.num_embeddings - self.config.vocab_size
        tables = 1 if self.config.tied else 2
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * tables

    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward and backward pass, as nanoGPT counts them.

        6 N + 12 L C T, N the parameters without position embeddings (Chowdhery et al., "PaLM", 2022,
        appendix B).
        """
        c = self.config
        matrices = self.parameter_count() - c.block_size * c.n_embd
        return 6 * matrices + 12 * c.n_layer * c.n_embd * c.block_size


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.heads = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.residual = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D)
            for part in self.qkv(x).chunk(3, dim=-1)  # (B, T, C) each
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        out: Tensor = self.residual(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(out, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.residual = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x), approximate="tanh")  # (B, T, 4C)
        return self.dropout(self.residual(hidden))  # type: ignore[no-any-return]
