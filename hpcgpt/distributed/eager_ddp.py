"""DistributedDataParallel without torch's compiler, for models that are not compiled as a whole.

DDP's constructor asks ``torch._dynamo`` for a setting of the compiler, and its forward pass is marked for the compiler.
The first of these loads it: more than a second of CPU time in each rank at each start, as much as torch itself. Here
the constructor gets the default of that setting, and the forward pass is not marked.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_PARENT: Any = vars(torch)
_NAME = "_dynamo"


class EagerDDP(DistributedDataParallel):
    """DDP of a module that is not compiled as a whole; the same buckets, messages and bits."""

    @contextmanager
    def _inside_ddp_forward(self) -> Iterator[None]:
        yield


def eager_ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """Return `module` in DDP with these options of its constructor. A collective.

    If this version of torch asks the compiler for anything else, the compiler is loaded, as usual.
    """
    if f"torch.{_NAME}" in sys.modules:
        return EagerDDP(module, **options)
    _PARENT[_NAME] = _Compiler()
    try:
        return EagerDDP(module, **options)
    finally:
        _remove()


class _Utils:
    """In the place of ``torch._dynamo.utils``."""

    @staticmethod
    def get_optimize_ddp_mode() -> str:
        return "ddp_optimizer"

    def __getattr__(self, name: str) -> Any:
        return getattr(_load().utils, name)


class _Compiler:
    """In the place of ``torch._dynamo``, which is loaded for every attribute but one."""

    utils = _Utils()

    def __getattr__(self, name: str) -> Any:
        return getattr(_load(), name)


def _load() -> Any:
    _remove()
    return importlib.import_module(f"torch.{_NAME}")


def _remove() -> None:
    """Remove what is in the compiler's place; not the compiler."""
    if isinstance(_PARENT.get(_NAME), _Compiler):
        del _PARENT[_NAME]
