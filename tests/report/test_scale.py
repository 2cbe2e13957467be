"""hpcgpt.report.scale: axes and short numbers."""

from __future__ import annotations

import pytest

from hpcgpt.report import scale
from hpcgpt.report.scale import Scale


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Scale(0, 10), [0, 2, 4, 6, 8, 10]),
        (Scale(2.7, 10.9), [4, 6, 8, 10]),
        (Scale(0, 6e-4), [0, 2e-4, 4e-4, 6e-4]),
        (Scale(-1, 1), [-1, -0.5, 0, 0.5, 1]),
        (Scale(0.1, 100, True), [0.1, 0.3, 1, 3, 10, 30, 100]),
        (Scale(0.9, 12, True), [1, 2, 5, 10]),
    ],
)
def test_ticks_are_round_and_few(axis: Scale, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


def test_a_value_is_placed_between_the_ends() -> None:
    assert [Scale(2, 6).place(value) for value in (2, 3, 6)] == [0, 0.25, 1]
    assert [Scale(1, 100, True).place(value) for value in (1, 10, 100)] == pytest.approx([0, 0.5, 1])


def test_an_axis_has_room_for_all_values() -> None:
    for lows, highs in (([3.0], [3.0]), ([0.0], [0.0]), ([2.0, 1.0], [5.0, 9.0]), ([-4.0], [-3.0]), ([1e-9], [1e9])):
        for from_zero in (False, True):
            axis = scale.around(lows, highs, from_zero, steep=True)
            assert axis.low < axis.high
            assert all(0 <= axis.place(value) <= 1 for value in (*lows, *highs))
    assert scale.around([0.1], [90.0], steep=True).logarithmic
    assert not scale.around([2.8], [10.9], steep=True).logarithmic
    assert scale.around([5.0], [9.0], from_zero=True).low == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (12_500, "12.5k"), (1.25e6, "1.25M"), (999_999, "1M"), (6e-4, "6e-4"), (1.5e-4, "1.5e-4"),
     (0.0015, "0.0015"), (3.14159, "3.142"), (-20_000, "-20k")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert scale.short(value) == text
