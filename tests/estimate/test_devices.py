"""hpcgpt/estimate/devices.py: names as people type them, and memory."""

from __future__ import annotations

import pytest

from hpcgpt.errors import UserError
from hpcgpt.estimate import devices


@pytest.mark.parametrize(
    ("typed", "name"),
    [("h100-80", "h100-80"), ("H100", "h100-94"), ("NVIDIA A100 80", "a100-80"), ("h200", "h200-141"),
     ("AMD MI250X", "mi250x-64"), ("cpu", "cpu"), ("a100_40", "a100-40")],
)  # fmt: skip
def test_a_name_as_it_is_typed(typed: str, name: str) -> None:
    assert devices.find(typed).name == name


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--gpu h101-80: not in the table \(.*\) \(did you mean h100-80\?\)"):
        devices.find("h101-80")


def test_memory_is_in_bytes_and_unknown_for_a_cpu() -> None:
    assert devices.find("h100-80").memory_bytes == 80 * 10**9
    assert devices.find("cpu").memory_bytes is None


def test_a_cpu_has_no_peak_and_an_a100_has() -> None:
    assert devices.find("cpu").peak_flops is None
    assert devices.find("a100-64").peak_flops == 312e12


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("a100", "a100-40"), ("a100_80", "a100-80"), ("a100-80gb", "a100-80"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("nvidia_h100_80gb_hbm3", "h100-80"), ("h100", "h100-64"), ("Tesla V100-SXM2-32GB", "v100-32"),
        ("AMD Instinct MI250X", "mi250x-64"), ("NVIDIA GH200 120GB", "gh200-96"), ("H200", "h200-141"),
        ("l40s", "l40s-48"), ("gtx_1080_ti", None), ("", None), ("a1000", None), ("cpu", "cpu"),
        ("NVIDIA H100 NVL", "h100-94"), ("NVIDIA H100 PCIe", "h100-80"),
        ("a100_1g.5gb", None), ("nvidia_h100_80gb_hbm3_3g.40gb", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)  # fmt: skip
def test_the_names_of_slurm_and_of_drivers_are_recognised(name: str, device: str | None) -> None:
    found = devices.recognised(name)
    assert (found and found.name) == device


@pytest.mark.parametrize(
    ("named", "driver", "same"),
    [
        ("a100", "NVIDIA A100-SXM4-80GB", True), ("a100_40", "NVIDIA A100-SXM4-80GB", False),
        ("h100", "NVIDIA H100 80GB HBM3", True), ("h100-94", "NVIDIA H100 80GB HBM3", False),
        ("h100-94", "NVIDIA H100 NVL", True), ("h100-80", "NVIDIA H100 NVL", False),
        ("h100-80", "NVIDIA H100 PCIe", True), ("h100-80", "NVIDIA H100", True), ("v100", "Tesla V100-SXM2-32GB", True),
        ("gh200", "NVIDIA GH200 480GB", True), ("a100", "NVIDIA H100 80GB HBM3", False), ("cpu", "cpu", True),
        ("cpu", "NVIDIA A100-SXM4-80GB", False),
    ],
)  # fmt: skip
def test_only_sizes_that_are_written_tell_two_devices_apart(named: str, driver: str, same: bool) -> None:
    known = devices.recognised(driver)
    assert known is not None
    for device in (devices.find(named), devices.recognised(named)):
        assert device is not None
        assert device.is_same_kind(known) is same


def test_the_size_of_a_card_comes_from_the_driver_where_no_other_is_written() -> None:
    card = devices.recognised("NVIDIA A100-SXM4-80GB")
    assert card is not None
    for name, means in (("a100", "a100-80"), ("a100-40", "a100-40")):
        assert devices.find(name).sized_by(card).name == means
    unsized = devices.recognised("NVIDIA A100")
    assert unsized is not None
    assert devices.find("a100").sized_by(unsized).name == "a100-80"  # as without it
