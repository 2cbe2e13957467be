"""hpcgpt/estimate/rates.py: each row of the table agrees with its source's own MFU, and gives a rate for this run."""

from __future__ import annotations

import pytest

from hpcgpt.errors import UserError
from hpcgpt.estimate import devices, rates
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.rates import MEASURED

# The sources' own MFU in per cent, where they give one (MosaicML's table, read on 2026-11-28).
PUBLISHED_MFU = {
    ("h100-80", "MPT-760M"): 39.76, ("h100-80", "MPT-1B"): 41.95, ("h100-80", "MPT-3B"): 46.2,
    ("h100-80", "MPT-7B"): 46.44, ("a100-80", "MPT-125M"): 43.15, ("a100-80", "MPT-350M"): 50.51,
    ("a100-80", "MPT-760M"): 47.76, ("a100-80", "MPT-1B"): 60.15, ("a100-80", "MPT-3B"): 62.73,
    ("a100-80", "MPT-7B"): 64.23, ("a100-40", "MPT-125M"): 40.89, ("a100-40", "MPT-350M"): 48.73,
    ("a100-40", "MPT-760M"): 53.63, ("a100-40", "MPT-1B"): 57.02, ("a100-40", "MPT-3B"): 58.14,
}  # fmt: skip
GPT2 = 6 * 123.65e6 + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_a_row_has_its_sources_mfu(row: rates.Measured) -> None:
    published = PUBLISHED_MFU.get((row.gpu, row.model))
    if published is None:
        assert row.system in ("nanoGPT", "llm.c")
        assert 0.25 < row.mfu < 0.5
    else:
        assert 100 * row.mfu == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("row", MEASURED, ids=str)
def test_a_row_names_where_it_is_from(row: rates.Measured) -> None:
    assert row.source.startswith("https://")


def test_the_rate_of_a_model_in_the_table_is_what_was_measured_for_it() -> None:
    found = rates.from_table(devices.find("a100-40"), GPT2, 8, computes_in_bf16=True)
    assert found is not None
    assert found.low / 8 == pytest.approx(106_667, rel=0.01)  # nanoGPT
    assert found.high > found.low
    assert len(found.sources) >= 2
    assert any(address.startswith("https://github.com/karpathy/nanoGPT") for address in found.addresses)
    assert len(set(found.addresses)) == len(found.addresses) == 2
    assert found.remark == ""


def test_a_gpu_that_is_not_in_the_table_has_the_utilisation_of_others_and_says_so() -> None:
    found = rates.from_table(devices.find("h200"), GPT2, 1, computes_in_bf16=True)
    assert found is not None
    assert "nothing was measured on h200-141" in found.remark


def test_a_model_far_from_all_others_is_compared_with_the_nearest_and_that_is_said() -> None:
    found = rates.from_table(devices.find("h100-80"), 1e13, 1, computes_in_bf16=True)
    assert found is not None
    assert found.low == found.high
    assert "MPT-7B" in found.remark


@pytest.mark.parametrize(("name", "bf16"), [("cpu", True), ("v100-32", False), ("h100-80", False)])
def test_nothing_is_said_about_a_device_or_a_dtype_without_a_peak(name: str, bf16: bool) -> None:
    assert rates.from_table(devices.find(name), GPT2, 1, bf16) is None


def test_a_run_that_was_measured_has_one_rate() -> None:
    found = rates.from_pace(Pace(20, 2.0, 100.0), "runs/a")
    assert (found.low, found.high, found.measured, found.sources) == (100.0, 100.0, True, ("runs/a",))


def test_a_run_with_too_few_steady_steps_has_no_rate() -> None:
    with pytest.raises(UserError, match=r"runs/a has 2 steady steps \(.*\): 3 are needed"):
        rates.from_pace(Pace(2), "runs/a")
