"""The weights in a checkpoint, read tensor by tensor: for models that need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpcgpt.checkpoint import layout, stored
from hpcgpt.checkpoint.safetensors_writer import DTYPES
from hpcgpt.checkpoint.stored import Piece, Reader, Stored
from hpcgpt.errors import InputError

_OF_MODELS = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class _Tensor:
    """Where the rows of a tensor are stored, in their order."""

    places: tuple[Stored, ...]
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.places[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.places[0].dtype


class Weights:
    """The weights of the checkpoint at `path`, which has been verified (`layout.verify`)."""

    def __init__(self, path: Path) -> None:
        """Find the weights, and read none.

        Raises:
            InputError: a tensor lacks rows, or is of a dtype that no model has.
        """
        self.path, self.state = path, layout.read_state(path)
        found: dict[str, list[Stored]] = {}
        with Reader(path) as reader:
            for file in layout.tensor_files(path):
                for one in reader.header(file):
                    if one.name.startswith("model/"):
                        found.setdefault(one.name.removeprefix("model/"), []).append(one)
        self._tensors = {name: _in_order(path, name, places) for name, places in found.items()}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Read a tensor, or these rows of it: on the CPU, in the dtype of the checkpoint."""
        tensor = self._tensors[name]
        wanted = range(tensor.rows) if rows is None else rows
        out = torch.empty((len(wanted), *tensor.shape[1:]), dtype=tensor.dtype)
        pieces = []
        for place in tensor.places:
            held = _rows(place)
            first, after = max(wanted.start, held.start), min(wanted.stop, held.stop)
            if first < after:
                start = place.start + (first - held.start) * place.row_bytes
                pieces.append(Piece(place.file, start, out[first - wanted.start : after - wanted.start], place.dtype))
        with Reader(self.path) as reader:
            stored.read(pieces, reader)
        return out


def _rows(place: Stored) -> range:
    return range(place.shape[0]) if place.rows is None else place.rows


def _in_order(path: Path, name: str, places: Iterable[Stored]) -> _Tensor:
    """Check that each row is stored once."""

    def first_row(place: Stored) -> int:
        return place.rows.start if place.rows else 0

    ordered, after = tuple(sorted(places, key=first_row)), 0
    for place in ordered:
        same = (place.shape[1:], place.dtype) == (ordered[0].shape[1:], ordered[0].dtype)
        if not place.shape or not same or not (place.rows is None or place.fits):
            raise InputError(
                f"{path / place.file}: {place.key} has the shape {place.shape} and dtype {place.dtype}, which do not "
                "fit"
            )
        if _rows(place).start != after:
            raise InputError(f"{path} has not each row of {name} once: see row {min(_rows(place).start, after):,}")
        after = _rows(place).stop
    if ordered[0].dtype not in _OF_MODELS:
        expected = ", ".join(DTYPES[dtype] for dtype in _OF_MODELS)
        raise InputError(f"{path}: {name} is of dtype {DTYPES[ordered[0].dtype]}, expected one of {expected}")
    return _Tensor(ordered, after)
