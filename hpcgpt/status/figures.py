"""Figures of a run in a few characters: counts, rates, durations and moments."""

from __future__ import annotations

import time
import unicodedata

UNKNOWN = "-"


def figure(value: float | None, form: str, missing: str = "?") -> str:
    return missing if value is None else format(value, form)


def count(number: float | None) -> str:
    """Format a count in at most six characters: 950, 12.3k, 1.25M."""
    if number is None:
        return UNKNOWN
    if number < 10_000:
        return f"{number:.0f}"
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.99995:
            return f"{number / size:.{2 if number < 9.995 * size else 1 if number < 99.95 * size else 0}f}{unit}"
    return f"{number:.0f}"


def fitted(number: float, width: int, places: int) -> str:
    """Format a number in at most `width` characters, 7 or more: 123.4567, 123.457 or 1.235e7.

    It has `places` decimals, or as many as there is room for. It is never cut: what is left of one would be another
    number.
    """
    for decimals in range(places, -1, -1):
        if len(text := f"{number:.{decimals}f}") <= width:
            return text
    for decimals in range(width - 4, -1, -1):
        mantissa, _, exponent = f"{number:.{decimals}e}".partition("e")
        if len(text := f"{mantissa}e{int(exponent)}") <= width:
            break
    return text


def span(seconds: float) -> str:
    """Format a duration for a sentence: 12 s, 3.5 min, 2.1 h, 1.4 days."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def short_span(seconds: float | None) -> str:
    """Format a duration in at most six characters: 12s, 3m05s, 2h07m, 4d11h, 123d."""
    if seconds is None:
        return UNKNOWN
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    if whole < 100 * 86400:
        return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
    return f"{min(whole // 86400, 99999)}d"


def moment(at: float, now: float) -> str:
    """Format a local time, without what is the same as now: 14:05, Sat 14:05, 2026-11-28 14:05."""
    then, today = time.localtime(at), time.localtime(now)
    if then[:3] == today[:3]:
        return time.strftime("%H:%M", then)
    if abs(at - now) < 6 * 86400:
        return time.strftime("%a %H:%M", then)
    return time.strftime("%Y-%m-%d %H:%M", then)


def columns(text: str) -> int:
    """Return how many columns a text takes in a terminal: a Chinese, Japanese or Korean character takes two."""
    return len(text) if text.isascii() else sum(map(_columns_of, text))


def pad(text: str, width: int) -> str:
    """Fill a text up with spaces to `width` columns."""
    return text + " " * (width - columns(text))


def shorten(text: str, width: int) -> str:
    """Cut out the middle of a text that is wider than `width` columns: both ends of a run's name matter."""
    if columns(text) <= width:
        return text
    if width < 5:
        return _beginning(text, width)
    head = _beginning(text, (width - 1) // 2)
    return f"{head}..{_beginning(text[::-1], width - 2 - columns(head))[::-1]}"


def cut(text: str, width: int) -> str:
    """Cut off a sentence that is wider than `width` columns."""
    if columns(text) <= width:
        return text
    return f"{_beginning(text, width - 3)}..." if width > 3 else "..."[: max(0, width)]


def _columns_of(character: str) -> int:
    return 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")


def _beginning(text: str, width: int) -> str:
    """Return as much of a text as fits into `width` columns."""
    taken = 0
    for number, character in enumerate(text):
        taken += _columns_of(character)
        if taken > width:
            return text[:number]
    return text
