"""Axes: the range of values that a chart shows, its ticks, and numbers in a few characters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST_RATIO = 20.0  # of the values of a linear axis that needs not begin at zero
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return where a value is: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values on the axis, at most about `most` of them."""
        if self.logarithmic:
            return self._powers(most)
        step = _round_step((self.high - self.low) / max(1, most - 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def _powers(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**e for e in decades for f in factors if self.low <= f * 10.0**e <= self.high]
            if len(found) <= most + 1:
                return found
        return found[:: -(-len(found) // most)]


def around(lows: Sequence[float], highs: Sequence[float], from_zero: bool = False, steep: bool = False) -> Scale:
    """Return the axis for values between `lows` and `highs`, which are finite.

    `from_zero`: it begins at zero. `steep`: it is logarithmic if the values differ by more than LARGEST_RATIO.
    """
    low, high = min(lows, default=0.0), max(highs, default=1.0)
    if from_zero:
        low = min(0.0, low)
    elif steep and low > 0 and high / low > LARGEST_RATIO:
        return Scale(low / 1.1, high * 1.1, logarithmic=True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    return Scale(low if low == 0 else low - room, high + room)


def _round_step(size: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size)) if size > 0 else 1.0
    return next((factor * power for factor in (1, 2, 5) if factor * power >= size * (1 - 1e-9)), 10 * power)


def short(value: float) -> str:
    """Format a number in a few characters: 950, 12.5k, 1.25M, 0.0006, 6e-5."""
    if value == 0:
        return "0"
    for size, unit in _UNITS:
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
