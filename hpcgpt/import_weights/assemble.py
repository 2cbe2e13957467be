"""Puts our tensors together from those of a source: fused, transposed, and fitted to vocabulary and context.

`assemble` only compares names and shapes, in a moment; each tensor is read and made when it is written. So a model
larger than memory can be imported.

Every tensor of the source is used, or known to say nothing (a causal mask, a table of frequencies, a head that is the
embedding once more), or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpcgpt.checkpoint.safetensors_writer import About
from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export.tensor_names import Piece, by_ours, zeros
from hpcgpt.import_weights.stored import Stored, Tensors
from hpcgpt.model.gpt import GPT

# The course's names of a block's attention.
ATTENTION = "att|attn|attention|mha|self_attention|multi_head_attention"
# Buffers that torch saves beside weights: masks of causal attention, and frequencies of rotary positions.
_BUFFERS = re.compile(rf"(.*\.)?(attn\.(bias|masked_bias)|({ATTENTION})\.mask|rotary_emb\.inv_freq)")
_TABLES = ("token_embedding.weight", "head.weight")
_POSITIONS = "position_embedding.weight"


@dataclass(frozen=True)
class Source:
    """What is to be imported: tensors, the model that they are, and which of our tensors each is a piece of.

    `origin` names it in messages, `format` is as huggingface/llama. `optional`: pieces that may be missing, and are
    zero then. `notes`: for a person.
    """

    origin: str
    format: str
    model: Model
    pieces: Sequence[Piece]
    tensors: Tensors
    optional: Callable[[Piece], bool] = lambda _: False
    notes: list[str] = field(default_factory=list)

    def find(self, theirs: str) -> str:
        """Return the name in the source of the tensor `theirs`, '' if it has none.

        A model is often published without its head, and its names without their first part.
        """
        return next((name for name in (theirs, theirs.partition(".")[2]) if name in self.tensors), "")

    def read(self, theirs: str) -> Tensor:
        """Read a tensor of the source."""
        return self.tensors[self.find(theirs)].read()


@dataclass(frozen=True)
class Assembled:
    """Dtype and shape of our tensors by name, and `make`, which returns one of them."""

    model: Model
    about: dict[str, About]
    make: Callable[[str], Tensor]
    notes: list[str]


def assemble(source: Source, model: Model) -> Assembled:
    """Return the tensors of `model`, which is source.model, maybe with another vocab_size and block_size.

    Raises:
        UserError: a tensor is missing, has another shape, or is not known; or what must be zero is not.
    """
    named, notes = _named(source)
    notes = [*source.notes, *notes]
    if any(stored is not None and stored.dtype == torch.float16 for stored in named.values()):
        notes.append("float16 is kept as float32, in which it is exact")
    groups = by_ours(list(source.pieces))
    with torch.device("meta"):
        expected = dict(GPT(model).named_parameters())
    assert groups.keys() == expected.keys(), "the table of names has all of our tensors"
    about = {name: (_dtype(parts, named), tuple(expected[name].shape)) for name, parts in groups.items()}

    def make(name: str) -> Tensor:
        dtype, shape = about[name]
        parts = [_part(piece, named[piece.theirs], dtype) for piece in groups[name]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _fitted(whole, name, model, shape)

    return Assembled(model, about, make, notes)


def _named(source: Source) -> tuple[dict[str, Stored | None], list[str]]:
    """Return the source's tensor of each piece, None if it is missing and may be, after all checks; and notes."""
    found: dict[str, Stored | None] = {}
    used = set()
    missing = []
    for piece in source.pieces:
        name = source.find(piece.theirs)
        if not name:
            found[piece.theirs] = None
            if piece.ours and not source.optional(piece):
                missing.append(piece.theirs)
            continue
        used.add(name)
        stored = found[piece.theirs] = source.tensors[name]
        if stored.shape != piece.shape:
            raise UserError(f"{source.origin}: {name} has shape {stored.shape}, expected {piece.shape} of this model")
        if stored.dtype is None:
            raise UserError(f"{source.origin}: {name} is not stored as floating-point numbers")
    if missing:
        why = ""
        if "lm_head.weight" in missing:
            why = ": the configuration says that the head is not tied to the embedding"
        raise UserError(f"{source.origin} lacks {_some(missing)}{why}")
    for piece in zeros(list(source.pieces)):
        bias = found[piece.theirs]
        if bias is not None and bias.read().count_nonzero():
            raise UserError(f"{source.origin}: {piece.theirs} is not zero, and our model has no such bias")
    notes = _rest(source, used)
    if absent := [piece.theirs for piece in source.pieces if piece.ours and found[piece.theirs] is None]:
        notes.append(f"{len(absent):,} biases that it does not have are zero: {_some(absent)}")
    return found, notes


def _rest(source: Source, used: set[str]) -> list[str]:
    """Return notes on the tensors that are not used. Raise UserError if one of them is not known to say nothing."""
    rest = sorted(source.tensors.keys() - used)
    notes = []
    if source.model.tied and "lm_head.weight" in rest:
        rest.remove("lm_head.weight")
        (embedding,) = (piece for piece in source.pieces if piece.ours == _TABLES[0])
        head, table = source.read("lm_head.weight"), source.read(embedding.theirs)
        if head.shape != table.shape or not torch.equal(head, table):
            raise UserError(
                f"{source.origin}: lm_head.weight is not {embedding.theirs}, but the configuration says that the head "
                "is tied to the embedding (tie_word_embeddings): correct the one that is wrong"
            )
        notes.append("not used: lm_head.weight, which is the embedding once more")
    buffers = [name for name in rest if _BUFFERS.fullmatch(name)]
    if unknown := [name for name in rest if name not in buffers]:
        raise UserError(f"{source.origin} has tensors that this model does not have: {_some(unknown)}")
    if buffers:
        notes.append(f"not used: {_some(buffers)}, which are no weights")
    return notes


def _dtype(parts: list[Piece], named: dict[str, Stored | None]) -> torch.dtype:
    """Return the narrowest dtype of checkpoints that holds all these pieces exactly. Missing ones are zero."""
    found = {stored.dtype for piece in parts if (stored := named[piece.theirs]) is not None}
    if torch.float64 in found:
        return torch.float64
    return torch.bfloat16 if found <= {torch.bfloat16} else torch.float32


def _part(piece: Piece, stored: Stored | None, dtype: torch.dtype) -> Tensor:
    if stored is None:
        return torch.zeros(piece.shape, dtype=dtype)
    tensor = stored.read()
    return (tensor.T if piece.transposed else tensor).to(dtype)


def _fitted(whole: Tensor, name: str, model: Model, shape: tuple[int, ...]) -> Tensor:
    """Return `whole` with as many rows as `shape`: cut, or with rows for new ids, and padding rows of zeros."""
    rows = {_POSITIONS: model.block_size} | dict.fromkeys(_TABLES, model.vocab_size)
    if name not in rows:
        return whole.contiguous()
    kept = whole[: rows[name]]
    fitted = torch.zeros(shape, dtype=whole.dtype)
    fitted[: len(kept)] = kept
    if len(kept) == rows[name]:
        return fitted
    # Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021: the mean row leaves the
    # probabilities of the other ids almost as they are. A row of zeros would be more likely than most of them.
    fitted[len(kept) : rows[name]] = whole.mean(dim=0, dtype=torch.float64).to(whole.dtype)
    return fitted


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(name[:100] for name in names[:3]) + more
