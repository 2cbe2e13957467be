"""Positions of the tokens of a forward pass, and which tokens each of them attends to: computed once for all blocks.

Without document masking a token attends to all earlier tokens of its window, and its position is its index in the
window. With document masking a window is split at the end-of-text tokens, with which documents begin
(``hpcgpt.data.shard_format``): attention stays within a document, and positions restart at each. A window that starts
in the middle of a document continues it, at position 0. The borders are computed on the device, from the ids
themselves: no transfer, no synchronization.

Shapes: B batch, T tokens of this pass, S all tokens that can be attended to (T, and those in a KV cache), D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from hpcgpt.config.options import Model


@dataclass(frozen=True)
class AttentionContext:
    """Positions and mask of the T tokens of a pass.

    `positions`: int64 (T,), or (B, T) where documents differ. `mask`: None for "all earlier tokens"; a bool tensor
    (B, 1, T, S), True where a token is attended to; or the same as flex attention's BlockMask. `rope`: cosine and sine
    of `rope_cos_sin`, for blocks with rotary positions. `allow_naive`: no particular kernel was requested, so
    `hpcgpt.model.attention.naive_attention` may be used.
    """

    positions: Tensor
    mask: Tensor | BlockMask | None = None
    rope: tuple[Tensor, Tensor] | None = None
    allow_naive: bool = False


def causal_context(new: int, ids: Tensor, allow_naive: bool = False) -> AttentionContext:
    """Return the context of the last `new` of `ids` (B, S), each attending to all tokens before it."""
    length = ids.shape[1]
    assert new in (1, length), "with a KV cache, tokens are added one at a time"
    positions = torch.arange(length - new, length, device=ids.device)  # (T,)
    return AttentionContext(positions, allow_naive=allow_naive)


def document_context(new: int, ids: Tensor, end_of_text: int, use_flex: bool) -> AttentionContext:
    """Return the context of the last `new` of `ids` (B, S), where each `end_of_text` begins a document."""
    documents, positions = document_positions(ids, end_of_text)  # (B, S)
    if use_flex:
        assert new == ids.shape[1], "flex attention is not used with a KV cache"
        return AttentionContext(positions, _block_mask(documents))
    earlier = torch.ones(new, ids.shape[1], dtype=torch.bool, device=ids.device).tril(ids.shape[1] - new)  # (T, S)
    mask = (documents[:, -new:, None] == documents[:, None, :]) & earlier  # (B, T, S)
    return AttentionContext(positions[:, -new:], mask.unsqueeze(1))


def document_positions(ids: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """Return the number of each token's document within its window, and its position in that document.

    Both int64 (B, S).
    """
    begins = ids == end_of_text
    indices = torch.arange(ids.shape[1], device=ids.device)
    # A document that began before the window is counted from the window's start.
    first = torch.where(begins, indices, 0).cummax(dim=1).values
    return begins.cumsum(dim=1), indices - first


def supports_flex(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """Return whether flex attention can compute this, gradients included."""
    return device.type == "cuda" and dtype != torch.float64 and dropout == 0


def rope_cos_sin(positions: Tensor, config: Model) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotation angles of `positions` (T,) or (B, T).

    float32, (T, D/2) or (B, 1, T, D/2). Pair i is rotated by position / rope_base^(2i / D), see also `slowed_down`.
    """
    size = config.head_width
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size  # (D/2,)
    frequencies = 1.0 / config.rope_base**exponents  # (D/2,), radians for each token
    if config.rope_factor != 1:
        frequencies = slowed_down(frequencies, config)
    angles = positions.unsqueeze(-1) * frequencies  # (..., T, D/2)
    if angles.dim() == 3:
        angles = angles.unsqueeze(1)  # (B, 1, T, D/2): the same for all heads
    return angles.cos(), angles.sin()


def slowed_down(frequencies: Tensor, config: Model) -> Tensor:
    """Divide low `frequencies` (D/2,) by model.rope_factor, so that a model can be used with a longer context.

    Pairs that turn more than rope_high times within rope_context keep their frequency, those that turn fewer than
    rope_low times are slowed down, and between the two the change is gradual. Source: Llama 3.1 (Grattafiori et al.,
    "The Llama 3 Herd of Models", 2024; rope_type "llama3" in transformers, whose order of operations is used, since
    rounding of frequencies grows with the position).
    """
    periods = 2 * math.pi / frequencies  # tokens
    kept = ((config.rope_context / periods - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    slow = frequencies / config.rope_factor
    gradual = (1 - kept) * frequencies / config.rope_factor + kept * frequencies
    return torch.where(kept == 1, frequencies, torch.where(kept == 0, slow, gradual))


def _block_mask(documents: Tensor) -> BlockMask:
    def is_attended(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    batch, length = documents.shape
    return create_block_mask(is_attended, batch, None, length, length, device=str(documents.device))
