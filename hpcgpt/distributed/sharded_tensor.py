"""Tensors that are sharded by rows: the rows of this rank, and the full tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LocalRows:
    """Rows `start` to `stop` of a tensor, held by this rank as `local`: all rows if the tensor is not sharded."""

    local: Tensor
    start: int
    stop: int


def local_rows(tensor: Tensor) -> LocalRows:
    """Return this rank's rows of a tensor, along its first dimension."""
    if not is_sharded(tensor):
        return LocalRows(tensor, 0, len(tensor) if tensor.dim() else 1)
    sharded: Any = tensor
    rows, local, mesh = len(tensor), sharded.to_local(), sharded.device_mesh
    ranks = mesh.ndim - 1  # the last dimension of the mesh: over the first of two, if there are, rows are replicated
    most = math.ceil(rows / mesh.size(ranks))
    start = min(rows, mesh.get_local_rank(ranks) * most)
    assert len(local) == min(rows, start + most) - start, "torch shards tensors in another way"
    return LocalRows(local, start, start + len(local))


def rows_to_save(tensor: Tensor) -> LocalRows:
    """Return the rows that this rank writes into a checkpoint: an equal part of those that other ranks have as well."""
    rows = local_rows(tensor)
    if not is_sharded(tensor) or tensor.device_mesh.ndim == 1:  # type: ignore[attr-defined]
        return rows
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    most = math.ceil(len(rows.local) / mesh.size(0))
    first = min(len(rows.local), mesh.get_local_rank(0) * most)
    local = rows.local[first : first + most]
    return LocalRows(local, rows.start + first, rows.start + first + len(local))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor. A collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor, a class whose module takes long to import."""
    return hasattr(tensor, "to_local")
