"""Which kernels compute a step: attention's, and compiled ones or not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
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


def attention(wanted: Attention, device: torch.device, dtype: torch.dtype) -> Context:
    """A context in which torch's attention takes the kernel `wanted`, for a forward pass that computes in `dtype`;
    "auto": whichever it finds best.

    "fa3" is FlashAttention 3, which torch calls where the package flash_attn_interface is installed (Hopper GPUs).

    Raises:
        UserError: this device does not have it, or not in `dtype`.
    """
    _tell_caches(wanted)
    if wanted == "auto":
        return nullcontext
    if device.type == "cpu" and wanted not in _ON_CPU:
        raise UserError(f"train.attention {wanted} is for GPUs: on a CPU it may be {', '.join(_ON_CPU)}")
    if device.type == "cuda" and wanted in _BF16_ON_GPU and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"train.attention {wanted} computes in bfloat16 on a GPU, and this run in {name}: take efficient or auto, "
            "or train.dtype bfloat16"
        )
    if wanted == "fa3":
        if find_spec("flash_attn_interface") is None:
            raise UserError("train.attention fa3 needs the package flash_attn_interface: install it, or take auto")
        try:
            activate_flash_attention_impl("FA3")
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"train.attention fa3 cannot be had: {error}") from None
    return partial(sdpa_kernel, _BACKENDS[wanted])


def _tell_caches(wanted: Attention) -> None:
    """Of code that was compiled in earlier processes, torch takes what has the same name, which does not tell by which
    kernel its attention was to be computed (pytorch issue 185449, in 2.13 still): so it is said here.
    """
    said = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = said if wanted == "auto" else f"{said} attention: {wanted}"


def compiles(wanted: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Is the model to be compiled? "auto": on a GPU, if what torch.compile needs there is installed.

    On a CPU compiling takes up to a minute for a step that is no more than 20 % faster: only who asks for it gets it.

    Raises:
        UserError: it was asked for, and what it needs is missing.
    """
    if device.type == "cuda":
        possible, lacks = find_spec("triton") is not None and _has("CC", "gcc", "clang"), "triton and a C compiler"
    else:
        possible, lacks = _has("CXX", "g++", "clang++"), "a C++ compiler"
    if wanted == "on" and not possible:
        raise UserError(f"train.compile on needs {lacks}: install it, or take off")
    return possible and (wanted == "on" or (wanted == "auto" and device.type == "cuda"))


def _has(variable: str, *names: str) -> bool:
    """One of these programs, or the one that the variable names."""
    return any(shutil.which(name) for name in (os.environ.get(variable, ""), *names) if name)
