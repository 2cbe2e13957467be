"""The kernels of a step: which attention kernel, deterministic ones only, and whether the model is compiled."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch._functorch.config as functorch
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from hpcgpt.errors import UserError

Attention = Literal["auto", "flash", "cudnn", "efficient", "math", "fa3"]
Context = Callable[[], AbstractContextManager[None]]

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,
}
_ON_CPU = ("auto", "flash", "math")
_BF16_ON_GPU = ("flash", "cudnn", "fa3")
_NVIDIA_ONLY = ("cudnn", "fa3")
# With other buffers cuBLAS may add in another order when kernels run side by side; torch refuses them, too.
_WORKSPACES = (":4096:8", ":16:8")


def attention(wanted: Attention, device: torch.device, dtype: torch.dtype) -> Context:
    """Return a context in which torch's attention uses the kernel `wanted`, for a forward pass in `dtype`.

    "auto": torch chooses. "fa3" is FlashAttention 3, which torch calls if the package flash_attn_interface is installed
    (Hopper GPUs).

    Raises:
        UserError: the kernel is not available on this device, or not in `dtype`.
    """
    _set_up_compile_cache(wanted)
    if wanted == "auto":
        return nullcontext
    if device.type == "cpu" and wanted not in _ON_CPU:
        raise UserError(f"train.attention {wanted} is for GPUs: on a CPU use {', '.join(_ON_CPU)}")
    if torch.version.hip and wanted in _NVIDIA_ONLY:
        raise UserError(f"train.attention {wanted} is for NVIDIA GPUs, and this torch is built for AMD's: use auto")
    if device.type == "cuda" and wanted in _BF16_ON_GPU and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"train.attention {wanted} computes in bfloat16 on a GPU, but this run computes in {name}: use efficient "
            "or auto, or train.dtype bfloat16"
        )
    if wanted == "fa3":
        if find_spec("flash_attn_interface") is None:
            raise UserError("train.attention fa3 needs the package flash_attn_interface: install it, or use auto")
        try:
            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"train.attention fa3 is not available: {error}") from None
    return partial(sdpa_kernel, _BACKENDS[wanted])


def deterministic(inside: Context, device: torch.device) -> Context:
    """Return the context `inside` with deterministic kernels only: they add in the same order each time.

    Forward passes, backward passes and the compilation of both belong in it. Gradients of attention (flash, efficient,
    fa3, flex) and of embeddings are then summed in a fixed order, instead of in that in which blocks of threads end,
    and Inductor chooses no kernel by timing: torch switches that on with its deterministic algorithms, in all versions
    that hpcgpt supports. An operation without a deterministic kernel raises RuntimeError.

    Raises:
        UserError: the environment gives cuBLAS buffers with which it is not deterministic.
    """
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    if device.type == "cuda" and workspace not in _WORKSPACES:
        raise UserError(
            f"train.deterministic needs CUBLAS_WORKSPACE_CONFIG {' or '.join(_WORKSPACES)} in the environment, and "
            f"found '{workspace}': unset it, and `hpcgpt train` sets it"
        )

    @contextmanager
    def both() -> Iterator[None]:
        with _deterministic_algorithms(), inside():
            yield

    return both


@contextmanager
def _deterministic_algorithms() -> Iterator[None]:
    import torch._inductor.config as inductor  # late, because it takes a moment

    filling: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    compiler, fills = inductor.deterministic, filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing here reads memory before it is written, and filling takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        inductor.deterministic, filling.fill_uninitialized_memory = compiler, fills


def _set_up_compile_cache(wanted: Attention) -> None:
    """Add the attention kernel to the key of torch's cache of compiled code, and keep models with loss chunks there.

    Without the kernel, code compiled by an earlier process for another one is reused (pytorch issue 185449, still in
    2.13). Graphs with an autograd.Function, as hpcgpt.model.loss has one, are not kept by default, since one may call
    code that is in no graph.
    """
    functorch.autograd_cache_allow_custom_autograd_functions = True
    tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = tag if wanted == "auto" else f"{tag} attention: {wanted}"


def compiles(wanted: Literal["auto", "on", "off"], device: torch.device, lacking: Collection[str]) -> bool:
    """Return whether to compile the model; `lacking` is what `lacks_to_compile` returned, on all ranks together.

    "auto": on a GPU, if nothing is lacking. Not on a CPU, where compiling takes up to a minute, for steps that are at
    most 20 % faster.

    Raises:
        UserError: "on", and something is lacking.
    """
    if wanted == "on" and lacking:
        raise UserError(f"train.compile on needs {' and '.join(sorted(lacking))}: install it, or use off")
    return not lacking and (wanted == "on" or (wanted == "auto" and device.type == "cuda"))


@cache
def lacks_to_compile(kind: Literal["cpu", "cuda"]) -> frozenset[str]:
    """Return what torch.compile needs on this host for code of this kind of device, and does not find.

    Both kinds compile C or C++ that is loaded into Python, and includes Python.h.
    """
    lacks = []
    if kind == "cuda" and find_spec("triton") is None:
        lacks.append("triton")
    if not (_has("CC", "gcc", "clang") if kind == "cuda" else _has("CXX", "g++", "clang++")):
        lacks.append("a C compiler" if kind == "cuda" else "a C++ compiler")
    folders = [sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix")]
    for variable in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):  # of gcc and clang
        folders += os.environ.get(variable, "").split(os.pathsep)
    if not any(Path(folder, "Python.h").is_file() for folder in folders if folder):
        lacks.append("Python.h (of python3-dev or python3-devel)")
    return frozenset(lacks)


def _has(variable: str, *names: str) -> bool:
    """Return whether one of these programs, or the one that the environment variable names, is installed."""
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name)
