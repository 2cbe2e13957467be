"""The GPT, top-down: GPT -> Block -> Norm, Attention, MLP. The last three differ between kinds of model.

Shapes: B batch, T time, C channels (n_embd), V vocabulary.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: pre-norm blocks, and an
initialisation that divides the standard deviation of the two projections into the residual stream by
sqrt(2 n_layer). What differs between ``model.kind = "gpt2"`` and ``"modern"`` is in ``hpcgpt.model.block_gpt2`` and
``hpcgpt.model.block_modern``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcgpt.config.options import Config, Model
from hpcgpt.model import attention_context, block_gpt2, block_modern, kernels, loss
from hpcgpt.model.attention_context import AttentionContext
from hpcgpt.model.kv_cache import KVCache, LayerKVCache

# The embedding's rows are padded to a multiple of this: matrix products are slow with odd sizes like 50,257.
VOCAB_MULTIPLE = 64
KINDS: dict[str, Any] = {"gpt2": block_gpt2, "modern": block_modern}


@dataclass(frozen=True)
class ForwardOptions:
    """Options of the forward pass that do not change what the weights are.

    `document_start`: the id that begins documents, to keep attention within them; None: attention spans the window.
    `loss_chunk`, `z_loss`: see `hpcgpt.model.loss`. `recompute`: activation checkpointing of each block. `attention`:
    train.attention, or '' if the kernel is not chosen; the kernel itself is set by a surrounding context
    (`hpcgpt.model.kernels`). Each forward pass reads it, so that torch.compile does not reuse code that was compiled
    for another kernel.
    """

    document_start: int | None = None
    loss_chunk: int = 0
    z_loss: float = 0.0
    recompute: bool = False
    attention: str = ""

    @classmethod
    def from_config(cls, config: Config, end_of_text: int) -> ForwardOptions:
        """Return the options of a run's configuration; `end_of_text` is the tokenizer's id."""
        return cls(
            end_of_text if config.data.document_mask else None,
            config.train.loss_chunk,
            config.optim.z_loss,
            config.train.activation_checkpointing,
            config.train.attention,
        )


PLAIN = ForwardOptions()


class GPT(nn.Module):
    def __init__(self, config: Model, seed: int = 0, options: ForwardOptions = PLAIN) -> None:
        """Make a model for `config.vocab_size` ids, with its initial weights; without weights on the device "meta"."""
        super().__init__()
        self.config, self.options = config, options
        rows = math.ceil(config.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.token_embedding = nn.Embedding(rows, config.n_embd)
        # Modern blocks have rotary positions instead.
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd) if config.kind == "gpt2" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = KINDS[config.kind].Norm(config.n_embd, config.epsilon)
        self.head = nn.Linear(config.n_embd, rows, bias=False)
        if config.tied:
            self.head.weight = self.token_embedding.weight
        # Flex attention is compiled, whatever train.compile is. Asked here, where no compiler traces the question.
        self.can_use_flex = not kernels.lacks_to_compile("cuda")
        self.mean_loss = loss.mean_loss  # an attribute, since FSDP compiles it separately: see hpcgpt.training.parallel
        self.initialise(seed)

    @torch.no_grad()
    def initialise(self, seed: int, fill: Callable[[nn.Parameter, Tensor], object] = Tensor.copy_) -> None:
        """Draw the initial weights on the CPU, from `seed` alone.

        `fill` is called with each parameter and all of its weights, float32: one after the other, so that they need not
        fit in memory together.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            fill(parameter, self._draw(name, parameter.shape, generator))

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.float32)
        if len(shape) == 1:  # the gains of norms, and biases
            return drawn.fill_(1.0 if name.endswith("weight") else 0.0)
        std = self.config.init_std
        if name.endswith("residual.weight"):
            std /= math.sqrt(2 * self.config.n_layer)
        return drawn.normal_(0.0, std, generator=generator)

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Return the mean loss in nats over all `targets` (B, T): (). Without targets, the logits of `ids`: (B, T, V).

        Every target counts, the end-of-text token that begins the next document too: it is predicted from the
        document before it. In training mode the loss includes the z-loss.

        With a `cache`, `ids` continue the cached tokens and are added to them; the logits are those after the last of
        `ids` only (B, 1, V).
        """
        hidden = self.hidden(ids, cache)  # (B, T, C)
        if targets is not None:
            return self.mean_loss(
                hidden.flatten(0, 1),
                targets.flatten(),
                self.head.weight,
                self._padding_bias(),
                chunk=self.options.loss_chunk,
                z_loss=self.options.z_loss if self.training else 0.0,
            )
        if cache is not None:
            hidden = hidden[:, -1:]  # (B, 1, C)
        return self.padded_logits(hidden)[..., : self.config.vocab_size]  # (B, T, V)

    def padded_logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of `hidden` (B, T, C), padding rows included as minus infinity: (B, T, V padded)."""
        return F.linear(hidden, self.head.weight, self._padding_bias())

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the last hidden states of `ids` (B, T), normalized: (B, T, C)."""
        all_ids = ids if cache is None else cache.extend(ids)  # (B, S)
        context = self._attention_context(all_ids, ids.shape[1], may_use_flex=cache is None)
        x = self.token_embedding(ids)  # (B, T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding(context.positions)
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            if self.options.recompute and self.training:
                # Without dropout there is no random state to save and restore.
                dropout = self.config.dropout > 0
                x = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=dropout)
            else:
                x = block(x, context, None if cache is None else cache.layers[number])
        return self.norm(x)  # type: ignore[no-any-return]

    def _attention_context(self, ids: Tensor, new: int, may_use_flex: bool = True) -> AttentionContext:
        """Return positions and mask of the last `new` of `ids` (B, S)."""
        c, weight = self.config, self.token_embedding.weight
        allow_naive = self.options.attention == "auto"
        if self.options.document_start is None:
            context = attention_context.causal_context(new, ids, allow_naive)
        else:
            dropout = c.dropout if self.training else 0.0
            # Flex attention is compiled for each length, and while text is generated every length occurs.
            possible = may_use_flex and self.can_use_flex
            flex = possible and attention_context.supports_flex(weight.device, weight.dtype, dropout)
            context = attention_context.document_context(new, ids, self.options.document_start, flex)
        if c.kind == "modern":
            rope = attention_context.rope_cos_sin(context.positions, c)
            context = replace(context, rope=rope)
        return context

    def _padding_bias(self) -> Tensor | None:
        """Return a bias (V padded) of minus infinity for the padding rows: they get no probability and no gradient.

        A bias of the matrix product costs nothing. Not a buffer, because DDP would broadcast it.
        """
        weight = self.head.weight
        if len(weight) == self.config.vocab_size:
            return None
        bias = torch.zeros(len(weight), device=weight.device, dtype=weight.dtype)
        bias[self.config.vocab_size :] = -math.inf
        return bias

    def parameter_count(self) -> int:
        """Count the parameters, without padding rows and a tied head only once."""
        padding = self.token_embedding.num_embeddings - self.config.vocab_size
        tables = 1 if self.config.tied else 2
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd * tables

    def flops_per_token(self) -> int:
        """Count the floating-point operations of one token's forward and backward pass, as nanoGPT does.

        6 N + 12 L H D T, for L layers of H heads of width D (Chowdhery et al., "PaLM", 2022, appendix B). N are the
        parameters in matrix products: the head, but neither position embeddings nor an untied token embedding. The
        second term is attention (queries times keys, attention weights times values), which grouped queries do not
        reduce. The causal mask, document masking and recomputation are ignored, so that figures of different runs can
        be compared.
        """
        c = self.config
        tables = 0 if self.position_embedding is None else c.block_size
        tables += 0 if c.tied else c.vocab_size
        attention = 12 * c.n_layer * c.n_head * c.head_width * c.block_size
        return 6 * (self.parameter_count() - tables * c.n_embd) + attention


class Block(nn.Module):
    def __init__(self, config: Model) -> None:
        super().__init__()
        kind = KINDS[config.kind]
        self.attention_norm = kind.Norm(config.n_embd, config.epsilon)
        self.attention = kind.Attention(config)
        self.mlp_norm = kind.Norm(config.n_embd, config.epsilon)
        self.mlp = kind.MLP(config)

    def forward(self, x: Tensor, context: AttentionContext, cache: LayerKVCache | None = None) -> Tensor:
        """Return `x` (B, T, C) plus what this block adds to it. `cache` has the keys and values of earlier tokens."""
        x = x + self.attention(self.attention_norm(x), context, cache)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
