"""Attention: which earlier tokens each token sees, and the one operation that looks at them.

A `Sight` is made once in a forward pass and serves all blocks. Without document masking every token sees all tokens
before it in its window, and its position is its place in the window. With it a window is cut at the end-of-text
tokens that begin documents (``hpcgpt.data.shard_format``): attention stays within a document, and positions restart at
each. A window that starts in the middle of a document continues it, at position 0. The borders are found on the device,
from the ids themselves: nothing is sent to it, and nothing waits for it.

Shapes: B batch, T tokens of this pass, S all tokens that are seen (T, and those in a cache), H heads, K key-value
heads, D head size.

`attend` is the only place that chooses a kernel. With document masks that is flex attention on a GPU (Dong et al.,
"Flex Attention: A Programming Model for Generating Optimized Attention Kernels", 2024): it skips the blocks of the
matrix that lie between documents, fuses under torch.compile, and its shapes do not depend on how many documents
there are, as those of the varlen kernels do, whose list of lengths would have to come to the host or be
padded. It has no dropout and no float64; there, and on a CPU, the mask is written out for PyTorch's own SDPA.

Without masks it is SDPA, but for short windows in bfloat16 on a CPU. There its kernel takes no advantage of the format,
and matrix products do: at 256 tokens they need half of its time, at 768 four fifths, at 1,024 more (see
benchmarks/attention.py). Scores are rounded to bfloat16 on the way, as everywhere before there were fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

# Longer windows are left to SDPA: the scores that are written out grow with the square of it.
WRITTEN_OUT_UP_TO = 512


@dataclass(frozen=True)
class Sight:
    """What the T tokens of a pass see.

    `positions` are theirs, int64 (T,) or, where documents differ, (B, T). `mask` None: everything before them; a
    tensor: bool (B, 1, T, S), True where a token is seen; a BlockMask: the same, as flex attention wants it.
    `rotation` is that of their positions, where a kind of block turns by it. `may_write_out`: nobody has asked for one
    of SDPA's kernels.
    """

    positions: Tensor
    mask: Tensor | BlockMask | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    may_write_out: bool = False


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight, dropout: float) -> Tensor:
    """The mix of `v` (B, K, S, D) that each query of `q` (B, H, T, D) finds by `k` (B, K, S, D): (B, H, T, D).

    H is a multiple of K: each key-value head serves H / K heads.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(sight.mask, BlockMask):
        # Inductor's kernel for CPUs reads values with the strides of the keys (torch 2.13), whatever theirs are.
        return _flex()(q, k, v.contiguous(), block_mask=sight.mask, enable_gqa=grouped)  # type: ignore[no-any-return]
    if sight.mask is None:
        # SDPA's causal mask begins at the first key. A single query that has keys before it sees them all.
        causal = q.shape[2] == k.shape[2]
        on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if causal and sight.may_write_out and on_cpu and q.shape[2] <= WRITTEN_OUT_UP_TO:
            return written_out(q, k, v, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)
    if grouped:  # of its kernels that take a mask none takes groups, but the one that writes all scores out
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sight.mask, dropout_p=dropout)


def written_out(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal attention as the products that it is: q and (B, H, T, D) from it, k and v (B, K, T, D)."""
    batch, heads, length, size = q.shape
    k, v = _repeated(k, heads), _repeated(v, heads)
    future = q.new_full((length, length), -math.inf).triu(1)  # (T, T)
    q, k, v = (part.reshape(batch * heads, length, size) for part in (q, k, v))  # (B H, T, D)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(size))  # (B H, T, T)
    chances = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.bmm(chances, v).view(batch, heads, length, size)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(B, K, S, D) for `heads` heads: (B, H, S, D)."""
    times = heads // x.shape[1]
    return x.repeat_interleave(times, dim=1) if times > 1 else x


def look_back(new: int, ids: Tensor, may_write_out: bool = False) -> Sight:
    """The sight of the last `new` of `ids` (B, S), where all of `ids` are one text."""
    length = ids.shape[1]
    assert new in (1, length), "behind a cache tokens come one at a time"
    positions = torch.arange(length - new, length, device=ids.device)  # (T,)
    return Sight(positions, may_write_out=may_write_out)


def look_within_documents(new: int, ids: Tensor, end_of_text: int, use_flex: bool) -> Sight:
    """The sight of the last `new` of `ids` (B, S), where each `end_of_text` begins a document."""
    documents, positions = borders(ids, end_of_text)  # (B, S)
    if use_flex:
        assert new == ids.shape[1], "there is no cache beside flex attention"
        return Sight(positions, _blocks(documents))
    earlier = torch.ones(new, ids.shape[1], dtype=torch.bool, device=ids.device).tril(ids.shape[1] - new)  # (T, S)
    mask = (documents[:, -new:, None] == documents[:, None, :]) & earlier  # (B, T, S)
    return Sight(positions[:, -new:], mask.unsqueeze(1))


def borders(ids: Tensor, end_of_text: int) -> tuple[Tensor, Tensor]:
    """The number of each token's document in its window, and its place in that document, both int64 (B, S)."""
    begins = ids == end_of_text
    places = torch.arange(ids.shape[1], device=ids.device)
    # Of a document that began before the window the window's start counts as its own.
    since = torch.where(begins, places, 0).cummax(dim=1).values
    return begins.cumsum(dim=1), places - since


def has_flex(device: torch.device, dtype: torch.dtype, dropout: float) -> bool:
    """Can flex attention compute this, gradients and all?"""
    return device.type == "cuda" and dtype != torch.float64 and dropout == 0


def _blocks(documents: Tensor) -> BlockMask:
    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[row, query] == documents[row, key])

    batch, length = documents.shape
    return create_block_mask(seen, batch, None, length, length, device=str(documents.device))


def _flex() -> Callable[..., Any]:
    """Flex attention; where the model around it is not compiled, compiled for itself, or it would write all scores
    out."""
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel  # type: ignore[no-any-return]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
