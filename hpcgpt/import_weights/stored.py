"""Tensors in the files of other programs: names, shapes and dtypes first, and each content when it is needed.

Two formats: safetensors, which is data; and what ``torch.save`` writes, a pickle, which can be made to run any code
when it is loaded. It is loaded with ``weights_only=True``: PyTorch's own unpickler then makes tensors, numbers, text
and containers of them, and refuses everything else.
"""

from __future__ import annotations

import functools
import json
import math
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hpcgpt.errors import UserError, cannot_read

INDEX_BYTES = 64 << 20  # no index of a released model is larger
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATS = tuple(_DTYPES.values())


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `dtype` is None if its numbers are none of `FLOATS`, so it is no weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]


Tensors = dict[str, Stored]


def of_folder(folder: Path) -> Tensors:
    """Return the tensors of a model's folder, as Hugging Face's ``save_pretrained`` writes it.

    Raises:
        UserError: there are none, one is in two files, or a file is damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return _of_file(folder / name)
        if index.exists():
            return _indexed(index)
    raise UserError(
        f"{folder} has no weights: neither model.safetensors, nor pytorch_model.bin, nor an index of shards"
    )


def pickled(path: Path) -> Any:
    """Return what ``torch.save`` wrote: tensors, numbers, text, and containers of them. Tensors stay on the disk.

    Raises:
        UserError: it is something else, or would run code.
    """
    _check_regular(path)
    with open(path, "rb") as file:
        in_zip = file.read(2) == b"PK"  # the format before PyTorch 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
    except Exception as error:  # what the unpickler raises depends on the file
        if isinstance(error, OSError):
            raise cannot_read(error, f"{path}: {error.strerror}") from None
        reason = str(error).strip().splitlines() or [type(error).__name__]
        detail = next((line for line in reason if "GLOBAL" in line or "Unsupported" in line), reason[0])
        raise UserError(
            f"{path} cannot be loaded as weights alone, so it is not loaded: anything else in it could run code "
            f"({detail.strip()[:300]})"
        ) from None


def of_state_dict(path: Path, state: Any) -> Tensors:
    """Return the tensors of a state dict that `pickled` has loaded.

    Raises:
        UserError: it is no state dict.
    """
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path}: expected a dictionary of tensors, found {type(state).__name__}")
    found: Tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {str(name)[:80]!r} is {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name} is a {tensor.layout} tensor on {tensor.device.type}: no weights")
        # A view may claim to be larger than what is stored.
        if math.prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, and fewer numbers than that are stored")
        dtype = tensor.dtype if tensor.dtype in FLOATS else None
        found[name] = Stored(tuple(tensor.shape), dtype, tensor.detach)
    return found


def _of_file(path: Path) -> Tensors:
    return _of_safetensors(path) if path.suffix == ".safetensors" else of_state_dict(path, pickled(path))


def _of_safetensors(path: Path) -> Tensors:
    _check_regular(path)
    found: Tensors = {}
    try:
        file: Any = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(name)
            found[name] = Stored(
                tuple(part.get_shape()), _DTYPES.get(part.get_dtype()), functools.partial(file.get_tensor, name)
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{path} is no valid safetensors file: {error}") from None
    return found


def _indexed(index: Path) -> Tensors:
    """Return the tensors of the shards that an index names. Each must lie in the index's own folder."""
    _check_regular(index)
    try:
        if index.stat().st_size > INDEX_BYTES:
            raise ValueError(f"it is larger than {INDEX_BYTES >> 20} MB")
        where = json.loads(index.read_bytes())["weight_map"]
        names = {str(tensor): str(file) for tensor, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of shards: {error!r}") from None
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or Path(file).suffix not in (".safetensors", ".bin"):
            raise UserError(f"{index} names {file[:200]!r}: expected a .safetensors or .bin file in the same folder")
    found: Tensors = {}
    for file in files:
        tensors = _of_file(index.parent / file)
        expected = {tensor for tensor, named in names.items() if named == file}
        if missing := sorted(expected - tensors.keys()):
            raise UserError(f"{index}: {file} lacks {', '.join(missing[:3])}")
        if more := sorted(tensors.keys() - expected):
            raise UserError(f"{index}: {file} also has {', '.join(more[:3])}, which the index does not name there")
        found |= tensors
    return found


def _check_regular(path: Path) -> None:
    """Raise UserError unless `path` is a regular file, or a link to one: reading a pipe might never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise cannot_read(error, f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is no regular file")
