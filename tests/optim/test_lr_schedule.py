"""hpcgpt.optim.lr_schedule: a table of values."""

from __future__ import annotations

from typing import Literal

import pytest

from hpcgpt.config.options import Config, Optim, Schedule
from hpcgpt.optim.lr_schedule import learning_rate

PEAK, INITIAL, LOW, WARMUP, TOTAL = 6e-4, 3e-5, 1e-6, 10, 100


Kind = Literal["cosine", "linear", "wsd", "constant"]


def rate(step: int, kind: Kind = "cosine", warmup: int = WARMUP, total: int = TOTAL,
         decay_fraction: float = 0.2) -> float:  # fmt: skip
    schedule = Schedule(kind, warmup, INITIAL, LOW, decay_fraction)
    return learning_rate(step, total, Config(optim=Optim(lr=PEAK), schedule=schedule))


@pytest.mark.parametrize(
    ("step", "value"),
    [
        (0, INITIAL),
        (1, 8.7e-5),
        (9, 5.43e-4),
        (10, PEAK),
        (55, 3.005e-4),
        # m + (p - m)/2 (1 + cos(89 pi / 90)), worked out with 30 digits.
        (99, 1.18244730778082886e-6),
        (100, LOW),
        (101, LOW),
        (10**9, LOW),
    ],
)
def test_cosine_equals_the_table(step: int, value: float) -> None:
    assert rate(step) == pytest.approx(value, rel=1e-12, abs=0)


def test_warm_up_rises_linearly_to_the_peak() -> None:
    steps = [rate(g + 1) - rate(g) for g in range(WARMUP)]
    assert steps == pytest.approx([(PEAK - INITIAL) / WARMUP] * WARMUP, rel=1e-9)


def test_cosine_only_falls_after_warm_up() -> None:
    values = [rate(g) for g in range(WARMUP, TOTAL + 1)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_without_warm_up_the_first_step_has_the_peak(kind: Kind) -> None:
    assert rate(0, kind, warmup=0) == PEAK


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, INITIAL), (9, 5.43e-4), (10, PEAK), (79, PEAK), (80, PEAK), (90, (PEAK + LOW) / 2),
     (99, LOW + (PEAK - LOW) / 20), (100, LOW), (1000, LOW)],
)  # fmt: skip
def test_wsd_stays_at_the_peak_and_falls_linearly_to_the_minimum(step: int, value: float) -> None:
    assert rate(step, "wsd") == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("step", "value"),
    # A line from (10, 6e-4) to (100, 1e-6): two thirds of it at step 40, 1/90 of it at step 99.
    [(0, INITIAL), (9, 5.43e-4), (10, PEAK), (40, 4.0033333333333333e-4), (55, 3.005e-4), (99, 7.6555555555555556e-6),
     (100, LOW), (101, LOW), (10**9, LOW)],
)  # fmt: skip
def test_linear_falls_linearly_from_warm_up_to_the_minimum(step: int, value: float) -> None:
    assert rate(step, "linear") == pytest.approx(value, rel=1e-12, abs=0)


def test_wsd_without_a_decay_stays_at_the_peak_to_the_last_step() -> None:
    assert rate(99, "wsd", decay_fraction=0.0) == PEAK


@pytest.mark.parametrize(("step", "value"), [(0, INITIAL), (9, 5.43e-4), (10, PEAK), (99, PEAK), (100, PEAK)])
def test_constant_stays_at_the_peak_after_warm_up(step: int, value: float) -> None:
    assert rate(step, "constant") == pytest.approx(value, rel=1e-12, abs=0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_run_shorter_than_its_warm_up_only_rises(kind: Kind) -> None:
    assert [rate(g, kind, total=5) for g in range(5)] == [rate(g) for g in range(5)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_a_run_of_one_step_has_a_rate(kind: Kind) -> None:
    assert rate(0, kind, warmup=0, total=1) == PEAK
