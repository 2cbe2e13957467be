"""DistributedDataParallel without torch's compiler, for models that are not compiled.

DDP's constructor asks ``torch._dynamo`` for a setting of the compiler, and its forward pass is marked for the compiler.
The first of these loads it: more than a second of CPU time in each rank at each start, as much as torch itself. Here
the constructor gets the default of that setting, and the forward pass is not marked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_PARENT: Any = vars(torch)
_NAME = "_dynamo"


class EagerDDP(DistributedDataParallel):
    """DDP of a module that is never compiled; the same buckets, messages and bits."""

    @contextmanager
    def _inside_ddp_forward(self) -> Iterator[None]:
        yield


def eager_ddp(module: nn.Module, **options: Any) -> DistributedDataParallel:
    """Return `module` in DDP with these options of its constructor. A collective.

    If this version of torch asks the compiler for anything else, the compiler is loaded as usual.
    """
    if f"torch.{_NAME}" in sys.modules:
        return EagerDDP(module, **options)
    stand_in = SimpleNamespace(utils=SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer"))
    _PARENT[_NAME] = stand_in
    try:
        return EagerDDP(module, **options)
    except AttributeError:
        _remove(stand_in)
        return EagerDDP(module, **options)
    finally:
        _remove(stand_in)


def _remove(stand_in: SimpleNamespace) -> None:
    """Remove the stand-in, unless the module has been loaded meanwhile and replaced it."""
    if _PARENT.get(_NAME) is stand_in:
        del _PARENT[_NAME]
