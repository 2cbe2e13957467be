"""The GPT, top-down: GPT -> Block -> Norm, Attention, MLP; these three are in a file of their own for each kind.

Shapes: B batch, T time, C channels (n_embd), V vocabulary.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm blocks, and an
initialisation that shrinks the two projections that write into the residual stream by sqrt(2 n_layer). What differs
between ``model.kind = "gpt2"`` and ``"modern"`` is in ``hpcgpt.model.block_gpt2`` and ``hpcgpt.model.block_modern``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcgpt.config.options import Config, Model
from hpcgpt.model import attention, block_gpt2, block_modern, loss
from hpcgpt.model.attention import Sight
from hpcgpt.model.kv_cache import Cache, Memory

# Rows of the embedding come in multiples of this: matrix units are slow on odd sizes, 50,257 most of all.
VOCAB_MULTIPLE = 64
KINDS: dict[str, Any] = {"gpt2": block_gpt2, "modern": block_modern}


@dataclass(frozen=True)
class Manner:
    """How a model computes; its weights are the same in any manner.

    `document_start`: the id that begins documents, which attention then does not cross; None: it sees the whole
    window. `loss_chunk` and `z_loss`: see `hpcgpt.model.loss`. `recompute`: blocks keep only their inputs for the
    backward pass, and compute the rest once more. `attention`: which kernel the context around asks for, or "auto" (see
    `hpcgpt.model.kernels`); '' where it is not chosen. It is looked at in each forward pass, so that torch.compile does
    not take what it made for one kernel where another is asked for.
    """

    document_start: int | None = None
    loss_chunk: int = 0
    z_loss: float = 0.0
    recompute: bool = False
    attention: str = ""

    @classmethod
    def of(cls, config: Config, end_of_text: int) -> Manner:
        """The manner that a configuration asks for; `end_of_text` is the tokenizer's id."""
        return cls(
            end_of_text if config.data.document_mask else None,
            config.train.loss_chunk,
            config.optim.z_loss,
            config.train.activation_checkpointing,
            config.train.attention,
        )


PLAIN = Manner()


class GPT(nn.Module):
    def __init__(self, config: Model, seed: int = 0, manner: Manner = PLAIN) -> None:
        """A model with `config.vocab_size` ids, its weights drawn on the CPU from `seed` alone."""
        super().__init__()
        self.config, self.manner = config, manner
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token_embedding = nn.Embedding(rows, config.n_embd)
        # The modern kind has rotary positions, in its attention.
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if config.kind == "gpt2" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = KINDS[config.kind].Norm(config.n_embd)
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        self.mean_loss = loss.mean_loss  # compiled for itself where the model as a whole cannot be
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

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """The mean loss in nats over all `targets` (B, T), or the logits of `ids` (B, T) int64: (B, T, V).

        Every target counts, also the end-of-text token that begins the next document: it is predicted from the
        document that it ends. In training the loss has its z-loss in it, which evaluation leaves out.

        With a `cache`, `ids` go on where it ends and are kept in it, and the logits are those behind the last of
        them only (B, 1, V).
        """
        hidden = self.hidden(ids, cache)  # (B, T, C)
        if targets is not None:
            manner = self.manner
            return self.mean_loss(
                hidden.flatten(0, 1),
                targets.flatten(),
                self.head.weight,
                self._padding_bias(),
                manner.loss_chunk,
                manner.z_loss if self.training else 0.0,
            )
        if cache is not None:
            hidden = hidden[:, -1:]  # (B, 1, C)
        return self.padded_logits(hidden)[..., : self.config.vocab_size]  # (B, T, V)

    def padded_logits(self, hidden: Tensor) -> Tensor:
        """Of `hidden` (B, T, C): (B, T, V padded), minus infinity behind the vocabulary."""
        return F.linear(hidden, self.head.weight, self._padding_bias())

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head reads of `ids` (B, T): (B, T, C)."""
        everything = ids if cache is None else cache.extend(ids)  # (B, S)
        sight = self._sight(everything, ids.shape[1], cache is None)
        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(sight.positions)
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            if self.manner.recompute and self.training:
                # Without dropout there is no random state to keep and to bring back.
                dropout = self.config.dropout > 0
                x = checkpoint(block, x, sight, use_reentrant=False, preserve_rng_state=dropout)
            else:
                x = block(x, sight, None if cache is None else cache.blocks[number])
        return self.norm(x)  # type: ignore[no-any-return]

    def _sight(self, ids: Tensor, new: int, may_flex: bool = True) -> Sight:
        """Where the last `new` of `ids` (B, S) stand, and what they see."""
        c, weight = self.config, self.token_embedding.weight
        may_write_out = self.manner.attention == "auto"
        if self.manner.document_start is None:
            sight = attention.look_back(new, ids, may_write_out)
        else:
            dropout = c.dropout if self.training else 0.0
            # It is compiled for a length, and those of texts that are generated all differ.
            flex = may_flex and attention.has_flex(weight.device, weight.dtype, dropout)
            sight = attention.look_within_documents(new, ids, self.manner.document_start, flex)
        if c.kind == "modern":
            turn = block_modern.rotation(sight.positions, c.n_embd // c.n_head)
            sight = replace(sight, rotation=turn)
        return sight

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

        6 N + 12 L C T (Chowdhery et al., "PaLM", 2022, appendix B). N are the parameters that a token is multiplied
        with: the head's table, but neither position embeddings nor a token table that is not the head's too. The
        second term are queries times keys and chances times values. Grouped queries do not lessen it, since each head
        has its own chances. It counts the whole square, half of which lies in the future, and what document masking
        and recomputation change is not counted either: so figures of different runs can be compared.
        """
        c = self.config
        tables = 0 if self.position_embedding is None else c.block_size
        tables += 0 if c.tied else c.vocab_size
        return 6 * (self.parameter_count() - tables * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        kind = KINDS[config.kind]
        self.attention_norm = kind.Norm(config.n_embd)
        self.attention = kind.Attention(config)
        self.mlp_norm = kind.Norm(config.n_embd)
        self.mlp = kind.MLP(config)

    def forward(self, x: Tensor, sight: Sight, memory: Memory | None = None) -> Tensor:
        """`x` (B, T, C) and what this block adds to it. `memory` has the keys and values of earlier tokens."""
        x = x + self.attention(self.attention_norm(x), sight, memory)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
