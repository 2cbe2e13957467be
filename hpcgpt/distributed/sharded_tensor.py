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
    rows, local = len(tensor), sharded.to_local()
    most = math.ceil(rows / sharded.device_mesh.size())
    start = min(rows, sharded.device_mesh.get_local_rank() * most)
    assert len(local) == min(rows, start + most) - start, "torch shards tensors in another way"
    return LocalRows(local, start, start + len(local))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all rows of a tensor. A collective if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor, a class whose module takes long to import."""
    return hasattr(tensor, "to_local")
