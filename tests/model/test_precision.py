"""hpcgpt.model.precision: bfloat16 where the hardware computes in it, and what was asked for where it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpcgpt.model import precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 fma", True),
        ("flags\t\t: fpu sse2 amx_bf16 amx_tile", True),
        ("Features\t: fp asimd i8mm bf16 dgh", True),
        ("flags\t\t: fpu sse2 avx2 avx512f avx512_fp16", False),
        ("Features\t: fp asimd asimddp", False),
        ("", False),
    ],
)
def test_a_cpu_says_itself_whether_it_multiplies_in_bfloat16(words: str, expected: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\n{words}\n\nprocessor\t: 1\n{words}\n")
    assert precision.cpu_has_bf16(cpuinfo) == expected


def test_where_nobody_can_say_it_does_not(tmp_path: Path) -> None:
    assert not precision.cpu_has_bf16(tmp_path / "cpuinfo")


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_bfloat16_where_the_hardware_has_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    for device in (CPU, GPU):
        assert precision.pick_dtype("auto", device) == (torch.bfloat16 if native else torch.float32)
        assert precision.pick_dtype("bfloat16", device) == torch.bfloat16
        assert precision.pick_dtype("float32", device) == torch.float32
        assert precision.pick_dtype("float64", device) == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_the_precision_and_parameters_stay_as_they_are(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 4)
    with precision.computing_in(dtype, CPU):
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
