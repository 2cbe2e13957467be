"""Checkpoints of other training programs: nanoGPT's ckpt.pt, and the course's model_%06d.pth.

**nanoGPT** saves a dictionary with ``model``, a state dict, and ``model_args``, the sizes. With ``bias = False`` its
model has no biases at all; ours are zero then. Its GELU is the exact one. Source: https://github.com/karpathy/nanoGPT,
model.py and train.py.

**The course** ("build a large language model from scratch") saves a state dict, whose names are those of its modules:
``tok_emb``, ``pos_emb``, ``trf_blocks.0.att.W_query``, ``trf_blocks.0.ff.layers.0``, ``final_norm.scale``,
``out_head``. Some of the names differ from one writer to the next, so a few spellings of each are known. Its GELU is in
the tanh form. Sizes are those of the tensors, but for the number of heads, which no tensor shows.

Both may have a prefix before every name, ``module.`` from DistributedDataParallel or ``_orig_mod.`` from torch.compile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import tensor_names
from hpcgpt.export.tensor_names import Piece
from hpcgpt.import_weights import stored
from hpcgpt.import_weights.assemble import ATTENTION, Source
from hpcgpt.import_weights.stored import Tensors

_PREFIXES = ("module.", "_orig_mod.")
_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_MOST = 1 << 24  # of any size
# Spellings of the course's names, for each of ours; "#" is the number of a block.
_NORM = {"weight": r"(scale|weight|gamma)", "bias": r"(shift|bias|beta)"}
_BLOCK = r"(trf_blocks|transformer_blocks|trf_block|blocks|layers|h)\.#"
_ATTENTION = rf"({ATTENTION})"
_MLP = r"(ff|ffn|mlp|feed_forward|feedforward)"
_QKV = {
    "query": r"(W_query|W_q|w_q|wq|q_proj|query)",
    "key": r"(W_key|W_k|w_k|wk|k_proj|key)",
    "value": r"(W_value|W_v|w_v|wv|v_proj|value)",
}
_FIRST = r"(layers\.0|net\.0|0|fc1|linear1|c_fc)"
_SECOND = r"(layers\.2|net\.2|2|fc2|linear2|c_proj)"


@dataclass(frozen=True)
class Unsaid:
    """What such a file does not say. `heads`: 0 if it was not given; `gelu`: '' for the program's own form."""

    heads: int = 0
    gelu: Literal["", "tanh", "exact"] = ""


def read(path: Path, unsaid: Unsaid) -> Source:
    """Return what is in a file that ``torch.save`` has written.

    Raises:
        UserError: it is neither of the two, or would run code when it is loaded.
    """
    content = stored.pickled(path)
    if isinstance(content, Mapping) and "model_args" in content:
        if unsaid.heads:
            raise UserError(f"--heads: {path} says how many there are")
        return _nanogpt(path, content, unsaid)
    state = content
    for key in ("model", "model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            state = content[key]
    return _course(path, _without_prefix(path, stored.of_state_dict(path, state)), unsaid)


def _without_prefix(path: Path, tensors: Tensors) -> Tensors:
    """Remove what DistributedDataParallel and torch.compile put before every name."""
    names: dict[str, str] = {}
    for name in tensors:
        short = name
        while short.startswith(_PREFIXES):
            short = short.partition(".")[2]
        if short in names:
            raise UserError(f"{path} has {short} twice, as {names[short]} and {name}")
        names[short] = name
    return {short: tensors[name] for short, name in names.items()}


# --- nanoGPT ---------------------------------------------------------------------------------------


def _nanogpt(path: Path, content: Mapping[str, Any], unsaid: Unsaid) -> Source:
    arguments = content["model_args"]
    sizes = [arguments.get(key) for key in _MODEL_ARGS] if isinstance(arguments, Mapping) else [None]
    if not all(type(size) is int and 0 < size <= _MOST for size in sizes):
        raise UserError(f"{path}: its model_args lack some of {', '.join(_MODEL_ARGS)}, or they are no sizes")
    tensors = _without_prefix(path, stored.of_state_dict(path, content.get("model")))
    layers, heads, channels, context, vocabulary = (int(size or 0) for size in sizes)
    if layers > len(tensors):
        raise UserError(f"{path}: its model_args say {layers:,} layers, and there are {len(tensors):,} tensors")
    if channels % heads:
        raise UserError(
            f"{path}: its model_args say {heads:,} heads for {channels:,} channels, which they do not divide"
        )
    model = Model(
        kind="gpt2", n_layer=layers, n_head=heads, n_embd=channels, block_size=context, vocab_size=vocabulary,
        gelu=unsaid.gelu or "exact",
    )  # fmt: skip
    biases = bool(arguments.get("bias", True))
    steps = content.get("iter_num")
    return Source(
        str(path), "nanogpt", model, tensor_names.pieces(model, "nanoGPT"), tensors,
        optional=lambda piece: not biases and piece.theirs.endswith(".bias"),
        notes=[f"nanoGPT, after {steps:,} steps"] if isinstance(steps, int) else [],
    )  # fmt: skip


# --- the course ------------------------------------------------------------------------------------


def _course(path: Path, tensors: Tensors, unsaid: Unsaid) -> Source:
    named = _Names(path, tensors)
    table, positions = (
        named.top(r"(tok_emb|token_emb|token_embedding|tok_embedding|wte)"),
        named.top(r"(pos_emb|position_emb|pos_embedding|position_embedding|positional_embedding|wpe)"),
    )
    (vocabulary, channels), context = named.matrix(table), named.matrix(positions)[0]
    layers = named.layers()
    if not unsaid.heads:
        raise UserError(f"{path} does not say how many attention heads a block has: give it, as --heads 12")
    if channels % unsaid.heads:
        raise UserError(f"--heads {unsaid.heads} do not divide the {channels:,} channels of {path}")
    head = named.top(r"(out_head|output_head|head|lm_head|output_layer)")
    width = named.matrix(named.of_block(0, rf"{_MLP}\.{_FIRST}\.weight"))[0]
    has_bias = bool(named.find(_block(0, rf"{_ATTENTION}\.{_QKV['query']}\.bias")))
    model = Model(
        kind="gpt2", n_layer=layers, n_head=unsaid.heads, n_embd=channels, block_size=context, vocab_size=vocabulary,
        tied=False, qkv_bias=has_bias, gelu=unsaid.gelu or "tanh", mlp_width=0 if width == 4 * channels else width,
    )  # fmt: skip
    pieces = [
        Piece(table, (vocabulary, channels), "token_embedding.weight"),
        Piece(positions, (context, channels), "position_embedding.weight"),
        Piece(head, (vocabulary, channels), "head.weight"),
    ]
    pieces += [Piece(named.norm(r"(final_norm|final_layer_norm|norm|ln_f)", kind), (channels,), f"norm.{kind}")
               for kind in _NORM]  # fmt: skip
    for number in range(layers):
        pieces += _course_block(named, number, model)
    return Source(str(path), "course", model, pieces, tensors)


def _course_block(named: _Names, number: int, model: Model) -> list[Piece]:
    channels, width, ours = model.n_embd, model.hidden_width, f"blocks.{number}"
    found = []
    for norm, spelled in (("attention_norm", r"(norm1|norm_1|layer_norm1|ln1|ln_1)"),
                          ("mlp_norm", r"(norm2|norm_2|layer_norm2|ln2|ln_2)")):  # fmt: skip
        for kind, ending in _NORM.items():
            found.append(Piece(named.of_block(number, rf"{spelled}\.{ending}"), (channels,), f"{ours}.{norm}.{kind}"))
    for kind in ("weight", "bias") if model.qkv_bias else ("weight",):
        for part, spelled in enumerate(_QKV.values()):
            theirs = named.of_block(number, rf"{_ATTENTION}\.{spelled}\.{kind}")
            shape = (channels, channels) if kind == "weight" else (channels,)
            found.append(Piece(theirs, shape, f"{ours}.attention.qkv.{kind}", part * channels))
    for spelled, module, outputs, inputs in (
        (rf"{_ATTENTION}\.(out_proj|W_out|w_o|wo|o_proj|proj)", "attention.residual", channels, channels),
        (rf"{_MLP}\.{_FIRST}", "mlp.up", width, channels),
        (rf"{_MLP}\.{_SECOND}", "mlp.residual", channels, width),
    ):
        weight, bias = (named.of_block(number, rf"{spelled}\.{kind}") for kind in ("weight", "bias"))
        found.append(Piece(weight, (outputs, inputs), f"{ours}.{module}.weight"))
        found.append(Piece(bias, (outputs,), f"{ours}.{module}.bias"))
    return found


class _Names:
    """The names in a file of the course, found by the patterns of their spellings."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        self._path, self._tensors = path, tensors

    def layers(self) -> int:
        matches = (re.match(_BLOCK.replace("#", r"(\d{1,9})") + r"\.", name) for name in self._tensors)
        numbers = {int(match[2]) for match in matches if match}
        if not numbers or numbers != set(range(len(numbers))):
            raise UserError(f"{self._path}: no blocks 0, 1, 2, ... among its tensors: {self._some()}")
        return len(numbers)

    def top(self, spelled: str) -> str:
        return self._one(rf"{spelled}\.weight")

    def norm(self, spelled: str, kind: str) -> str:
        return self._one(rf"{spelled}\.{_NORM[kind]}")

    def of_block(self, number: int, spelled: str) -> str:
        return self._one(_block(number, spelled))

    def matrix(self, name: str) -> tuple[int, int]:
        shape = self._tensors[name].shape
        if len(shape) != 2 or not all(shape):
            raise UserError(f"{self._path}: {name} has shape {shape}, expected a matrix")
        return shape[0], shape[1]

    def find(self, pattern: str) -> list[str]:
        return [name for name in self._tensors if re.fullmatch(pattern, name)]

    def _one(self, pattern: str) -> str:
        found = self.find(pattern)
        if len(found) != 1:
            what = "has no tensor" if not found else f"has {', '.join(found[:3])}: several tensors"
            raise UserError(
                f"{self._path} {what} {pattern.replace(chr(92), '')}: it is neither nanoGPT's checkpoint nor the "
                f"course's; its tensors are {self._some()}"
            )
        return found[0]

    def _some(self) -> str:
        names = [name[:60] for name in list(self._tensors)[:8]]
        return ", ".join(names) + (f" and {len(self._tensors) - 8:,} more" if len(self._tensors) > 8 else "")


def _block(number: int, spelled: str) -> str:
    return _BLOCK.replace("#", str(number)) + rf"\.{spelled}"
