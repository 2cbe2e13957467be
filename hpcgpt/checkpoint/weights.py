"""The weights in a checkpoint, read tensor by tensor: for models that need not fit in memory.

A file is mapped only while a tensor is read from it, so a process that has read all of them holds none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.errors import InputError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Place:
    """Rows `start` to `stop` of a tensor are stored in `share` under `key`."""

    share: Path
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Stored:
    """The places of a tensor, in the order of its rows, and the shape of a row."""

    places: tuple[_Place, ...]
    row: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The weights of the checkpoint at `path`, which has been verified (`layout.verify`)."""

    def __init__(self, path: Path) -> None:
        """Find the weights, and read none.

        Raises:
            InputError: a tensor lacks rows, or is of a dtype that no model has.
        """
        self.path, self.state = path, layout.read_state(path)
        self._stored = _index(path, self.state)

    @property
    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        return (stored.places[-1].stop, *stored.row)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Read a tensor, or these rows of it: on the CPU, in the dtype of the checkpoint."""
        stored = self._stored[name]
        wanted = range(stored.places[-1].stop) if rows is None else rows
        out = torch.empty((len(wanted), *stored.row), dtype=stored.dtype)
        for place in stored.places:
            first, after = max(wanted.start, place.start), min(wanted.stop, place.stop)
            if first < after:
                part = _read_rows(place, first - place.start, after - place.start)
                out[first - wanted.start : after - wanted.start].copy_(part)
        return out


def _index(path: Path, state: State) -> dict[str, _Stored]:
    found: dict[str, list[_Place]] = {}
    about: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank in range(state.world_size):
        share = path / layout.share_name(rank, state.world_size)
        for key, shape, dtype in _keys(share):
            name, rows = layout.rows_of(key)
            name = name.removeprefix("model/")
            start, stop = (0, shape[0]) if rows is None else (rows.start, rows.stop)
            fits = shape and stop - start == shape[0]
            if not fits or about.setdefault(name, (shape[1:], dtype)) != (shape[1:], dtype):
                raise InputError(f"{share}: {key} has the shape {shape} and dtype {dtype}, which do not fit")
            found.setdefault(name, []).append(_Place(share, key, start, stop))
    return {name: _Stored(_in_order(path, name, found[name]), row, _dtype(path, name, dtype))
            for name, (row, dtype) in about.items()}  # fmt: skip


def _keys(share: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Return key, shape and dtype of each weight in a share."""
    with _opened(share) as file:
        parts = [(key, file.get_slice(key)) for key in file.keys() if key.startswith("model/")]  # noqa: SIM118
        return [(key, tuple(part.get_shape()), part.get_dtype()) for key, part in parts]


def _in_order(path: Path, name: str, places: Iterable[_Place]) -> tuple[_Place, ...]:
    ordered = tuple(sorted(places, key=lambda place: place.start))
    after = 0
    for place in ordered:
        if place.start != after:
            raise InputError(f"{path} has not each row of {name} once: see row {min(place.start, after):,}")
        after = place.stop
    return ordered


def _dtype(path: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in _DTYPES:
        raise InputError(f"{path}: {name} is of dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _read_rows(place: _Place, first: int, after: int) -> Tensor:
    with _opened(place.share) as file:
        return file.get_slice(place.key)[first:after]  # type: ignore[no-any-return]


def _opened(share: Path) -> Any:
    try:
        return safe_open(share, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{share}: {error}") from None
