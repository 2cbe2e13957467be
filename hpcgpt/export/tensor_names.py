"""Which rows of our tensors the tensors of other programs' models are: one table for export and import.

`pieces` lists every tensor of a model in another program, in the order of the forward pass, as a `Piece`: its name and
shape there, the tensor of ours that has its values, and which rows of it.

* Export reads the rows ``piece.rows`` of ``piece.ours``, transposes them if ``piece.transposed``, and has the tensor
  ``piece.theirs``. If ``piece.ours`` is empty, it is zeros of ``piece.shape``: a bias that we do not have.
* Import goes the other way: `by_ours` groups the pieces by our tensors. The pieces of a tensor cover its rows from 0 on
  without a gap; rows after the last one are padding of the vocabulary. A piece without a tensor of ours (`zeros`) must
  be zero: our model could not state anything else.

A matrix is (outputs, inputs), as in torch's Linear. GPT-2's at Hugging Face are of a class Conv1D, (inputs, outputs):
these are transposed. The rotary pairs of our modern block are dimensions i and i + D/2 of a head, as at Hugging Face,
for Llama as well as for Qwen3; so no row of queries and keys changes its place.

`modules` names the modules of theirs that compute what modules of ours do, for messages on where two models part.

Shapes: C channels (n_embd), H heads, K key-value heads, D head width, F hidden width of the MLP, V vocabulary.
No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hpcgpt.config.options import Model

# The classes of Hugging Face's transformers; nanoGPT's model has GPT-2's names with untransposed matrices, and llm.c's
# file the same tensors without names.
Architecture = Literal[
    "GPT2LMHeadModel", "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "nanoGPT", "llm.c"
]


@dataclass(frozen=True)
class Piece:
    """The tensor `theirs`, of this `shape` there: rows of `ours` from `start` on; '' for zeros."""

    theirs: str
    shape: tuple[int, ...]
    ours: str = ""
    start: int = 0
    transposed: bool = False

    @property
    def rows(self) -> range:
        """Return the rows of `ours` that this is."""
        count = self.shape[-1] if self.transposed else self.shape[0]
        return range(self.start, self.start + count)


def architecture(model: Model) -> Architecture:
    """Return the class of Hugging Face's that computes what this model does.

    Qwen3 and Llama differ in Qwen3's norms on queries and keys, which are those of our modern block: for each head,
    with gains, before the rotation.
    """
    if model.kind == "gpt2":
        return "GPT2LMHeadModel"
    return "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"


def pieces(model: Model, target: Architecture) -> list[Piece]:
    """Return the tensors of a `target` with the shape of `model`. A tied head is no tensor of its own."""
    if target in _OF_GPT2:
        return list(_gpt2(model, transposed=target == "GPT2LMHeadModel"))
    return list(_modern(model, qk_norm=target == "Qwen3ForCausalLM", residual_bias=target != "Qwen2ForCausalLM"))


def by_ours(found: list[Piece]) -> dict[str, list[Piece]]:
    """Return the pieces of each of our tensors, in the order of their rows. Those without one are left out."""
    grouped: dict[str, list[Piece]] = {}
    for piece in found:
        if piece.ours:
            grouped.setdefault(piece.ours, []).append(piece)
    return {name: sorted(parts, key=lambda part: part.start) for name, parts in grouped.items()}


def zeros(found: list[Piece]) -> list[Piece]:
    """Return the pieces of which we have no tensor, and which are zero."""
    return [piece for piece in found if not piece.ours]


def modules(model: Model, target: Architecture) -> dict[str, str]:
    """Return the name of each module of ours and of the one of theirs that computes the same, in order."""
    gpt2 = target in _OF_GPT2
    stem, blocks, parts = ("transformer", "h", _GPT2_PARTS) if gpt2 else ("model", "layers", _MODERN_PARTS)
    found = {"token_embedding": f"{stem}.{'wte' if gpt2 else 'embed_tokens'}"}
    if gpt2:
        found["position_embedding"] = f"{stem}.wpe"
    for number in range(model.n_layer):
        found |= {f"blocks.{number}.{ours}": f"{stem}.{blocks}.{number}.{theirs}" for ours, theirs in parts.items()}
    return found | {"norm": f"{stem}.{'ln_f' if gpt2 else 'norm'}", "head": "lm_head"}


_OF_GPT2 = ("GPT2LMHeadModel", "nanoGPT", "llm.c")
_GPT2_PARTS = {"attention_norm": "ln_1", "attention": "attn", "mlp_norm": "ln_2", "mlp": "mlp"}
_MODERN_PARTS = {
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "mlp_norm": "post_attention_layernorm",
    "mlp": "mlp",
}


def _gpt2(model: Model, transposed: bool) -> Iterator[Piece]:
    channels, width = model.n_embd, model.hidden_width
    # Of each linear layer: ours, theirs, outputs, inputs.
    attention = (
        ("attention.qkv", "attn.c_attn", 3 * channels, channels),
        ("attention.residual", "attn.c_proj", channels, channels),
    )
    mlp = (("mlp.up", "mlp.c_fc", width, channels), ("mlp.residual", "mlp.c_proj", channels, width))

    def layer_norm(theirs: str, ours: str) -> Iterator[Piece]:
        for kind in ("weight", "bias"):
            yield Piece(f"{theirs}.{kind}", (channels,), f"{ours}.{kind}")

    yield Piece("transformer.wte.weight", (model.vocab_size, channels), "token_embedding.weight")
    yield Piece("transformer.wpe.weight", (model.block_size, channels), "position_embedding.weight")
    for number in range(model.n_layer):
        there, here = f"transformer.h.{number}", f"blocks.{number}"
        for norm, linears in (("attention_norm", attention), ("mlp_norm", mlp)):
            yield from layer_norm(f"{there}.{_GPT2_PARTS[norm]}", f"{here}.{norm}")
            for ours, theirs, outputs, inputs in linears:
                shape = (inputs, outputs) if transposed else (outputs, inputs)
                yield Piece(f"{there}.{theirs}.weight", shape, f"{here}.{ours}.weight", transposed=transposed)
                has_bias = model.qkv_bias or ours != "attention.qkv"
                yield Piece(f"{there}.{theirs}.bias", (outputs,), f"{here}.{ours}.bias" if has_bias else "")
    yield from layer_norm("transformer.ln_f", "norm")
    if not model.tied:
        yield Piece("lm_head.weight", (model.vocab_size, channels), "head.weight")


def _modern(model: Model, qk_norm: bool, residual_bias: bool) -> Iterator[Piece]:
    channels, width, size = model.n_embd, model.hidden_width, model.head_width
    queries, keys = model.n_head * size, model.kv_heads * size
    # The rows of our fused matrix: theirs, the first row, their number.
    qkv = (("q_proj", 0, queries), ("k_proj", queries, keys), ("v_proj", queries + keys, keys))
    yield Piece("model.embed_tokens.weight", (model.vocab_size, channels), "token_embedding.weight")
    for number in range(model.n_layer):
        there, here = f"model.layers.{number}", f"blocks.{number}"
        attention = f"{there}.self_attn"
        yield Piece(f"{there}.input_layernorm.weight", (channels,), f"{here}.attention_norm.weight")
        for theirs, start, count in qkv:
            yield Piece(f"{attention}.{theirs}.weight", (count, channels), f"{here}.attention.qkv.weight", start)
            if model.qkv_bias:
                yield Piece(f"{attention}.{theirs}.bias", (count,), f"{here}.attention.qkv.bias", start)
        if qk_norm:
            yield Piece(f"{attention}.q_norm.weight", (size,), f"{here}.attention.query_norm.weight")
            yield Piece(f"{attention}.k_norm.weight", (size,), f"{here}.attention.key_norm.weight")
        yield Piece(f"{attention}.o_proj.weight", (channels, queries), f"{here}.attention.residual.weight")
        if model.qkv_bias and residual_bias:  # `attention_bias` means all four projections, and our last one has none
            yield Piece(f"{attention}.o_proj.bias", (channels,))
        yield Piece(f"{there}.post_attention_layernorm.weight", (channels,), f"{here}.mlp_norm.weight")
        for theirs, start in (("gate_proj", 0), ("up_proj", width)):
            yield Piece(f"{there}.mlp.{theirs}.weight", (width, channels), f"{here}.mlp.gate_and_up.weight", start)
        yield Piece(f"{there}.mlp.down_proj.weight", (channels, width), f"{here}.mlp.residual.weight")
    yield Piece("model.norm.weight", (channels,), "norm.weight")
    if not model.tied:
        yield Piece("lm_head.weight", (model.vocab_size, channels), "head.weight")
