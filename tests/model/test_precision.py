"""hpcgpt.model.precision: bfloat16 where the hardware computes in it, or the configured precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpcgpt.model import precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 fma", True),
        ("flags\t\t: fpu sse2 amx_bf16 amx_tile", True),
        ("Features\t: fp asimd i8mm bf16 dgh", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_fp16", False),
        ("Features\t: fp asimd asimddp", False),
        ("", False),
    ],
)
def test_bfloat16_support_is_read_from_the_flags_of_the_cpu(flags: str, expected: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
    assert precision.cpu_has_bf16(cpuinfo) == expected


def test_without_cpuinfo_there_is_no_bfloat16_support(tmp_path: Path) -> None:
    assert not precision.cpu_has_bf16(tmp_path / "cpuinfo")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_hardware_supports_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    for device in (CPU, GPU):
        assert precision.pick_dtype("auto", device) == (torch.bfloat16 if native else torch.float32)
        assert precision.pick_dtype("bfloat16", device) == torch.bfloat16
        assert precision.pick_dtype("float32", device) == torch.float32
        assert precision.pick_dtype("float64", device) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_have_the_precision_and_parameters_stay_float32(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with precision.computing_in(dtype, CPU):
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
