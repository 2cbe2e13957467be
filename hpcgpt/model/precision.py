"""Which floating-point format the forward pass computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 with AVX512 or AMX, and 64-bit Arm


def pick_dtype(wanted: Literal["auto", "bfloat16", "float32", "float64"], device: torch.device) -> torch.dtype:
    """The dtype that train.dtype means on `device`; "auto" is bfloat16 only where the hardware computes in it."""
    if wanted == "auto":
        native = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[wanted]


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which the forward pass computes in `dtype`: for bfloat16 autocast, else as the weights are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def allow_tf32(device: torch.device) -> None:
    """On a GPU the matrix products that stay in float32 may be rounded to 10 bits: its matrix units do no others."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Does this CPU multiply in bfloat16? Without it, bfloat16 is emulated and slower than float32."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(_BF16_FLAGS & set(flags.split()))
