"""Runs models whose weights need not fit in memory: a module has its weights only while it computes.

The model is made without memory for its parameters. Before a module runs, its own parameters are read and converted to
float64; after it they are dropped. So the largest module decides what is in memory, and not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Read = Callable[[str], Tensor]
# Called with the name and the output of each watched module, (..., T, C).
Watch = Callable[[str, Tensor], None]


@contextmanager
def without_memory_for_parameters() -> Iterator[None]:
    """Make the parameters of modules that are built in this context meta tensors; buffers are as always.

    The device "meta" as a default would take the values of buffers away, too: rotary frequencies are computed when a
    module is made, and are in no file.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_on_demand(model: nn.Module, read: Read) -> None:
    """Make every module read its own parameters when it runs, and drop them afterwards.

    `read` gets the name of a parameter, that of its first module if several share it.
    """
    shared = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        own = {key: shared[id(p)] for key, p in module._parameters.items() if p is not None}
        if own:
            _hook(module, own, read)


def _hook(module: nn.Module, own: dict[str, str], read: Read) -> None:
    empty = {key: module._parameters[key] for key in own}

    def fill(module: nn.Module, _inputs: Any) -> None:
        for key, name in own.items():
            module._parameters[key] = nn.Parameter(read(name).double(), requires_grad=False)

    def drop(module: nn.Module, _inputs: Any, _output: Any) -> None:
        module._parameters.update(empty)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


@contextmanager
def watched(model: nn.Module, names: dict[str, str], watch: Watch) -> Iterator[None]:
    """Call `watch` with the output of each module of `model` in `names`: its name there -> the name to report.

    A module that the model lacks is not reported.
    """
    there = dict(model.named_modules())
    handles = []
    for name, reported in names.items():
        if name in there:
            handles.append(there[name].register_forward_hook(_reporter(reported, watch)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reporter(name: str, watch: Watch) -> Callable[..., None]:
    def report(_module: nn.Module, _inputs: Any, output: Any) -> None:
        watch(name, output[0] if isinstance(output, tuple) else output)

    return report
