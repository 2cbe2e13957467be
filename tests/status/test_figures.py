"""hpcgpt.status.figures: figures in a few characters."""

from __future__ import annotations

import time

import pytest

from hpcgpt.status import figures


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (950.4, "950"), (9999, "9999"), (10_000, "10.0k"), (19_073, "19.1k"), (123_456, "123k"),
     (999_499, "999k"), (999_960, "1.00M"), (1_250_000, "1.25M"), (2.5e9, "2.50G"), (9.996e12, "10.0T"),
     (7e17, "700P")],
)  # fmt: skip
def test_counts(number: float | None, text: str) -> None:
    assert figures.count(number) == text


def test_counts_and_durations_fit_their_columns() -> None:
    numbers = [number * 10**power for power in range(16) for number in (0.9996, 1.0, 4.567, 9.99, 9.996)]
    assert max(len(figures.count(number)) for number in numbers) <= 6
    assert max(len(figures.short_span(number)) for number in numbers) <= 6


@pytest.mark.parametrize(
    ("number", "width", "places", "text"),
    [(3.4120499, 7, 4, "3.4120"), (123.45678, 7, 4, "123.457"), (99999.96, 7, 4, "100000"),
     (1_234_567.0, 7, 4, "1234567"), (12_345_678.0, 7, 4, "1.235e7"), (1.7e308, 7, 4, "1.7e308"),
     (-12_345_678.0, 7, 4, "-1.23e7"), (0.0, 7, 4, "0.0000"), (12_345_678.0, 8, 2, "12345678"),
     (123_456_789.0, 8, 2, "1.2346e8"), (10.123456, 8, 6, "10.12346")],
)  # fmt: skip
def test_a_number_that_is_too_long_has_fewer_places_and_then_an_exponent(
    number: float, width: int, places: int, text: str
) -> None:
    assert figures.fitted(number, width, places) == text


def test_no_number_is_wider_than_its_column_or_another_number() -> None:
    for power in range(-5, 308):
        for factor in (0.99999996, 1.0, 4.5678912, -9.9999996):
            number = factor * 10.0**power
            text = figures.fitted(number, 7, 4)
            assert len(text) <= 7
            assert float(text) == pytest.approx(number, rel=0.06, abs=1e-4)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (3599.6, "1h00m"), (7620, "2h07m"),
     (4.46 * 86400, "4d11h"), (123 * 86400, "123d")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str) -> None:
    assert figures.short_span(seconds) == text


def test_moments_leave_out_what_is_the_same_as_now() -> None:
    now = time.mktime((2026, 11, 28, 12, 0, 0, 0, 0, -1))
    hour = 3600
    assert figures.moment(now + 2 * hour, now) == "14:00"
    assert figures.moment(now + 24 * hour, now) == "Sun 12:00"
    assert figures.moment(now + 240 * hour, now) == "2026-12-08 12:00"


def test_names_keep_both_ends() -> None:
    assert figures.shorten("sweep-lr-0003", 20) == "sweep-lr-0003"
    assert figures.shorten("sweep-with-a-long-name-17", 15) == "sweep-w..ame-17"
    assert [len(figures.shorten("x" * 50, width)) for width in range(1, 50)] == list(range(1, 50))
    assert figures.cut("a sentence that is long", 12) == "a sentenc..."
    assert [len(figures.cut("x" * 50, width)) for width in range(50)] == list(range(50))


def test_a_chinese_character_takes_two_columns() -> None:
    assert figures.columns("萧炎-1") == 6
    assert figures.columns("e\u0301") == 1  # with an accent of its own
    assert figures.pad("萧炎", 6) == "萧炎  "
    assert figures.shorten("萧炎斗之力三段", 9) == "萧炎..段"
    assert all(figures.columns(figures.shorten("萧炎斗之力三段" * 3, width)) <= width for width in range(40))
    assert all(figures.columns(figures.cut("萧炎斗之力三段" * 3, width)) <= width for width in range(40))
