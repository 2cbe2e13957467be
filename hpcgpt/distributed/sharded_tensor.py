"""What this rank has of a tensor of which other ranks have other rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Held:
    """What this rank has of a tensor: `local`, its rows `first` to `after`. All of it where ranks have no shares."""

    local: Tensor
    first: int
    after: int


def held(tensor: Tensor) -> Held:
    """What this rank has of a tensor; the first dimension counts as rows."""
    if not is_share(tensor):
        return Held(tensor, 0, len(tensor) if tensor.dim() else 1)
    shared: Any = tensor
    rows, local = len(tensor), shared.to_local()
    most = math.ceil(rows / shared.device_mesh.size())
    first = min(rows, shared.device_mesh.get_local_rank() * most)
    assert len(local) == min(rows, first + most) - first, "the library cuts tensors in another way"
    return Held(local, first, first + len(local))


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor. A collective if ranks have shares of it."""
    return tensor.full_tensor() if is_share(tensor) else tensor  # type: ignore[attr-defined]


def is_share(tensor: Tensor) -> bool:
    """Have other ranks other rows of this tensor? It is a DTensor then, a class whose module takes long to load."""
    return hasattr(tensor, "to_local")
