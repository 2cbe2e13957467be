"""Writes a run's model as llm.c's files (https://github.com/karpathy/llm.c, train_gpt2.py, llmc/tokenizer.h).

::

    OUT/
      model.bin       256 int32: 20240326, version (3 float32, 5 bfloat16), context, vocabulary, layers, heads,
                      channels, padded vocabulary, zeros; then the tensors of `KINDS`, each of all layers
      tokenizer.bin   256 uint32: 20240328, 2, ids, end-of-text, zeros; then of each id its length (one byte) and bytes;
                      only of a byte-level BPE. llm.c looks for it as gpt2_tokenizer.bin in its working folder
      README.md

Everything is little-endian; matrices are (outputs, inputs). The vocabulary is padded with zeros to a multiple of 128.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import nanogpt, reference_gpt2, tensor_names
from hpcgpt.export.agreement import Agreement, DisagreementError, compare, ours
from hpcgpt.export.source import Probe, Source
from hpcgpt.export.tensor_names import Piece
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.interface import Tokenizer

FILE, TOKENIZER_FILE = "model.bin", "tokenizer.bin"
MAGIC, VERSIONS = 20240326, {torch.float32: 3, torch.bfloat16: 5}
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
HEADER_INTS = 256
VOCAB_MULTIPLE = 128
# The order of the tensors, by the part of their names after the number of the layer.
KINDS = (
    "wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
    "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
    "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias",
)  # fmt: skip


def refuse(model: Model) -> None:
    """Check that llm.c can state this model.

    Raises:
        UserError: it cannot; the message says why.
    """
    nanogpt.refuse(model, "llm.c")
    if model.gelu != "tanh":
        raise UserError(f"llm.c cannot state this model: its GELU is the tanh form, and here {model.gelu}. Use --to hf")


def write(source: Source, folder: Path) -> None:
    """Write model.bin, and tokenizer.bin if llm.c can have this tokenizer, tensor by tensor.

    Raises:
        OSError: the disk is full, or fails.
    """
    model = source.model
    padded = math.ceil(model.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:8] = (MAGIC, VERSIONS[source.dtype], model.block_size, model.vocab_size, model.n_layer, model.n_head,
                  model.n_embd, padded)  # fmt: skip
    with atomic.open_plain(folder / FILE) as file:
        file.write(header.tobytes())
        for piece in _in_order(source.pieces("nanoGPT")):
            tensor = source.tensor(piece)
            file.write(tensor.view(torch.uint8).numpy().data)
            if piece.theirs == "transformer.wte.weight":
                missing = torch.zeros((padded - len(tensor), model.n_embd), dtype=source.dtype)
                file.write(missing.view(torch.uint8).numpy().data)
    if (content := tokenizer_file(source.tokenizer)) is not None:
        with atomic.open_plain(folder / TOKENIZER_FILE) as file:
            file.write(content)


def tokenizer_file(tokenizer: Tokenizer) -> bytes | None:
    """Return the content of tokenizer.bin; None if it cannot state this tokenizer: an id without bytes, or over 255."""
    if not isinstance(tokenizer, ByteLevelBPE):
        return None
    tokens = {number: token for token, number in tokenizer.ranks.items()}
    tokens |= {number: name.encode() for name, number in tokenizer.special_tokens.items()}
    listed = [tokens.get(number, b"") for number in range(tokenizer.vocab_size)]
    if not all(1 <= len(token) <= 255 for token in listed):
        return None
    header = np.zeros(HEADER_INTS, dtype="<u4")
    header[:4] = (TOKENIZER_MAGIC, TOKENIZER_VERSION, len(listed), tokenizer.end_of_text)
    return header.tobytes() + b"".join(bytes([len(token)]) + token for token in listed)


@dataclass(frozen=True)
class ModelFile:
    """A model.bin that was read: the header's model, and where each tensor begins."""

    path: Path
    model: Model
    dtype: torch.dtype
    starts: dict[str, int]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """Read a tensor by nanoGPT's name; of the embedding the padded rows, too."""
        shape = self.shapes[name]
        with open(self.path, "rb") as file:
            file.seek(self.starts[name])
            content = bytearray(file.read(math.prod(shape) * self.dtype.itemsize))
        return torch.frombuffer(content, dtype=torch.uint8).view(self.dtype).view(shape)


def read_header(path: Path) -> ModelFile:
    """Read the header of a model.bin, and find its tensors.

    Raises:
        DisagreementError: it is not a model.bin of these versions, or has another length than its header says.
    """
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    versions = {version: dtype for dtype, version in VERSIONS.items()}
    if len(header) < HEADER_INTS or header[0] != MAGIC or int(header[1]) not in versions:
        raise DisagreementError(f"{path} has the header {header[:8].tolist()}")
    context, vocabulary, layers, heads, channels, padded = map(int, header[2:8])
    model = Model(n_layer=layers, n_head=heads, n_embd=channels, block_size=context, vocab_size=vocabulary)
    dtype, at = versions[int(header[1])], 4 * HEADER_INTS
    starts, shapes = {}, {}
    for piece in _in_order(tensor_names.pieces(model, "nanoGPT")):
        shape = (padded, channels) if piece.theirs == "transformer.wte.weight" else piece.shape
        starts[piece.theirs], shapes[piece.theirs] = at, shape
        at += math.prod(shape) * dtype.itemsize
    if at != path.stat().st_size:
        raise DisagreementError(f"{path} has {path.stat().st_size:,} bytes, and its header asks for {at:,}")
    return ModelFile(path, model, dtype, starts, shapes)


def check(source: Source, folder: Path, probe: Probe) -> Agreement:
    """Check that the weights in model.bin compute what the run does.

    Raises:
        DisagreementError: they do not.
    """
    found = read_header(folder / FILE)
    other = reference_gpt2.forward(reference_gpt2.shape_of(found.model), found.read)
    return compare(ours(source.model, source.read()), other, probe.ids, source.model)


def notes(folder: Path) -> list[str]:
    """Say what is missing."""
    return [] if (folder / TOKENIZER_FILE).exists() else ["llm.c's tokenizer file cannot state the run's tokenizer"]


def _in_order(pieces: list[Piece]) -> Iterator[Piece]:
    for kind in KINDS:
        yield from (
            piece for piece in pieces if re.fullmatch(rf"transformer\.(h\.\d+\.)?{re.escape(kind)}", piece.theirs)
        )


USAGE = """
```bash
cp THIS_FOLDER/tokenizer.bin gpt2_tokenizer.bin    # in a checkout of llm.c
./train_gpt2cu -e THIS_FOLDER/model.bin            # built with PRECISION=FP32 or BF16, as the dtype is
```
"""
