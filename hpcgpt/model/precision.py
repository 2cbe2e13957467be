"""The floating-point format of the forward pass."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 with AVX512 or AMX, and 64-bit Arm


def pick_dtype(wanted: Literal["auto", "bfloat16", "float32", "float64"], device: torch.device) -> torch.dtype:
    """Return the dtype that train.dtype means on `device`; "auto" is bfloat16 if the hardware computes in it."""
    if wanted == "auto":
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[wanted]


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return a context for forward passes in `dtype`: autocast for bfloat16, else the dtype of the weights."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def allow_tf32(device: torch.device) -> None:
    """Let a GPU compute the remaining float32 matrix products in TF32, with 10 bits of mantissa."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


@cache
def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU multiplies in bfloat16; otherwise bfloat16 is emulated, and slower than float32."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))
