"""The attention operation. `attend` is the only function that chooses its implementation.

With a BlockMask (document masking on a GPU) it is flex attention (Dong et al., "Flex Attention: A Programming Model for
Generating Optimized Attention Kernels", 2024): it skips the blocks of the matrix between documents, is fused by
torch.compile, and its shapes do not depend on the number of documents. Those of the varlen kernels do: their list of
lengths would have to be copied to the host, or padded. Flex attention has no dropout and no float64; for these, and on
a CPU, the mask is a dense tensor for PyTorch's SDPA.

Without a mask it is SDPA, except for short windows in bfloat16 on a CPU: there SDPA's kernel gains nothing from
bfloat16, while matrix products do. At 256 tokens they take half of its time, at 768 four fifths, at 1,024 more than it
(benchmarks/attention.py). They round scores to bfloat16, as was usual before there were fused kernels.

Shapes: B batch, T queries, S keys (T, and those in a KV cache), H heads, K key-value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hpcgpt.model.attention_context import AttentionContext

# Longer windows use SDPA: the naive implementation's scores grow with the square of the length.
NAIVE_UP_TO = 512


def attend(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext, dropout: float) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v of `q` (B, H, T, D), `k` and `v` (B, K, S, D), masked: (B, H, T, D).

    H is a multiple of K: each key-value head is shared by H / K query heads.
    """
    grouped = q.shape[1] != k.shape[1]
    if isinstance(context.mask, BlockMask):
        # Inductor's kernel for CPUs assumes that values have the strides of keys (torch 2.13).
        return _flex()(q, k, v.contiguous(), block_mask=context.mask, enable_gqa=grouped)  # type: ignore[no-any-return]
    if context.mask is None:
        # SDPA aligns its causal mask with the first key. A single query with a KV cache attends to all keys instead.
        causal = q.shape[2] == k.shape[2]
        on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if causal and context.allow_naive and on_cpu and q.shape[2] <= NAIVE_UP_TO:
            return naive_attention(q, k, v, dropout)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)
    if grouped:  # with a mask, SDPA supports groups only in the kernel that materializes all scores
        k, v = _repeat_heads(k, q.shape[1]), _repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, dropout_p=dropout)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Compute causal attention by plain matrix products: `q` and result (B, H, T, D), `k` and `v` (B, K, T, D)."""
    batch, heads, length, size = q.shape
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    future = q.new_full((length, length), -math.inf).triu(1)  # (T, T)
    q, k, v = (part.reshape(batch * heads, length, size) for part in (q, k, v))  # (B H, T, D)
    scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=1 / math.sqrt(size))  # (B H, T, T)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    return torch.bmm(weights, v).view(batch, heads, length, size)


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key-value heads (B, K, S, D) for `heads` query heads: (B, H, S, D)."""
    times = heads // x.shape[1]
    return x.repeat_interleave(times, dim=1) if times > 1 else x


def _flex() -> Callable[..., Any]:
    """Return flex attention, compiled by itself if the surrounding model is not: eager, it materializes all scores."""
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    return kernel  # type: ignore[no-any-return]


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
