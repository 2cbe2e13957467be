"""What is exported: the weights of a checkpoint, its tokenizer, and some real windows to check the export on.

Windows are of the run's validation split, or of its training split if it has no other, spread evenly. Where the shards
are gone they are random ids.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpcgpt import plan
from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.weights import Weights
from hpcgpt.config.options import Config, Model
from hpcgpt.data.loader import Windows
from hpcgpt.errors import InputError, UserError
from hpcgpt.export import tensor_names
from hpcgpt.export.tensor_names import Architecture, Piece
from hpcgpt.output.counted import counted
from hpcgpt.tokenizer.interface import Tokenizer, stream
from hpcgpt.training.step import to_ids

# All logits of the check are in memory twice, in float64.
MOST_TOKENS, MOST_LOGIT_BYTES = 1024, 256 << 20


@dataclass(frozen=True)
class Source:
    """A checkpoint to export in `dtype`. `folder`: of the run."""

    folder: Path
    config: Config
    weights: Weights
    tokenizer: Tokenizer
    dtype: torch.dtype

    @property
    def model(self) -> Model:
        return self.config.model

    @property
    def state(self) -> State:
        return self.weights.state

    @property
    def val_loss(self) -> float | None:
        """Return the validation loss in nats; None if this step was not evaluated."""
        return layout.val_loss(self.weights.path)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def pieces(self, target: Architecture) -> list[Piece]:
        """Return the tensors of an export.

        Raises:
            InputError: the checkpoint does not have the tensors of its configuration.
        """
        found = tensor_names.pieces(self.model, target)
        for name, parts in tensor_names.by_ours(found).items():
            rows = parts[-1].rows.stop
            if name not in self.weights.names or self.weights.shape(name)[0] < rows:
                raise InputError(f"{self.weights.path} lacks {name} with {rows:,} rows, which its config.toml asks for")
        return found

    def tensor(self, piece: Piece) -> Tensor:
        """Read a tensor of an export, contiguous."""
        if not piece.ours:
            return torch.zeros(piece.shape, dtype=self.dtype)
        return converted(piece, self.weights.read(piece.ours, piece.rows).to(self.dtype))

    def read(self, dtype: torch.dtype | None = None) -> Callable[[str], Tensor]:
        """Return a function that reads a tensor of ours, rounded as in the export (or to `dtype`), in float64."""
        rounded = dtype or self.dtype
        return lambda name: self.weights.read(name).to(rounded).double()

    def is_rounded(self) -> bool:
        """Return whether the weights lose digits in the export."""
        return any(self.weights.dtype(name).itemsize > self.dtype.itemsize for name in self.weights.names)


def converted(piece: Piece, rows: Tensor) -> Tensor:
    """Return a tensor of an export from the rows of ours that it is."""
    return rows.T.contiguous() if piece.transposed else rows


@dataclass(frozen=True)
class Probe:
    """Ids (B, T) to check an export on, what they are, and their texts for the tokenizer; none for random ids."""

    ids: Tensor
    what: str
    texts: list[str]


def probe(source: Source) -> Probe:
    """Choose the ids that an export is checked on."""
    model = source.model
    most = min(MOST_TOKENS, MOST_LOGIT_BYTES // (8 * model.vocab_size))
    length = max(2, min(model.block_size, most))
    count = max(1, most // length)
    try:
        windows, split = _windows(source)
    except (UserError, OSError) as error:
        drawn = torch.randint(model.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))
        return Probe(drawn, f"random ids, since the run's shards cannot be read ({error})", [])
    numbers = np.unique(np.linspace(0, windows.count - 1, count).astype(np.int64))
    ids = to_ids(windows.read(numbers))[:, :length]
    texts = ["".join(stream(source.tokenizer, row.tolist())) for row in ids]
    what = f"{counted(len(numbers), 'window')} of the {split} split, {ids.numel():,} tokens"
    # An unfinished character at the border of a window is no text that could be encoded again.
    return Probe(
        ids, what, [text for text in texts if "\ufffd" not in text] or [text.strip("\ufffd") for text in texts]
    )


def _windows(source: Source) -> tuple[Windows, str]:
    """Open the windows of the run's validation split, or of its training split.

    Raises:
        UserError: the shards are gone, or are not those of the run.
    """
    config = source.config
    try:
        planned = plan.open_to_read(config, source.state, validation=True)
    except UserError:  # without validation
        planned = plan.open_to_read(config, source.state, validation=False)
    part = next((part for part in planned.sets if part.val), planned.sets[0])
    size = config.model.block_size
    windows = Windows(part.val or part.train, size, size, config.model.vocab_size)
    if windows.count < 1:
        raise UserError("the split has not one window of block_size tokens")
    return windows, "validation" if part.val else "training"
