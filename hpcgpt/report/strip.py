"""Which attempt the steps of a chart are of, as a strip above it, and where one failed or went back, below its axis.

Labels never overlap: the number of an attempt is as wide as its part of the strip at most, or is hidden by style.css,
and marks that are close together share a label. What has no room here is in the legend and in the list below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcgpt.report.columns import Columns
from hpcgpt.report.markup import Markup, colour, element, join
from hpcgpt.report.scale import Scale

UNITS = 1000
LEAST_LABEL = 0.012  # of the width, of a part that may get a number
FAILED, WENT_BACK = "▲", "←"
GLYPH, DIGIT = 0.042, 0.025  # their widths as fractions of a chart on a phone, of about 300 pixels


@dataclass(frozen=True)
class Stretch:
    """Neighbouring steps of one attempt, which is -1 where it is not known: after step `begin`, until `end`."""

    attempt: int
    begin: int
    end: int


@dataclass(frozen=True)
class Mark:
    """A step at which attempt `attempt` failed or went back: see the glyphs above."""

    at: float
    glyph: str
    attempt: int | None
    words: str


def stretches(columns: Columns) -> list[Stretch]:
    """Divide the steps of a run by their attempts."""
    if not len(columns):
        return []
    new = np.flatnonzero(columns.attempt[1:] != columns.attempt[:-1]) + 1
    starts, ends = [0, *new.tolist()], [*(new - 1).tolist(), len(columns) - 1]
    return [
        Stretch(int(columns.attempt[start]), int(columns.first[start]) - 1, int(columns.last[end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def strip(found: Sequence[Stretch], changed: Callable[[int], bool], x: Scale) -> Markup | None:
    """Draw the strip; a star follows the number of an attempt with changed settings. None if there is one attempt."""
    if len(found) < 2:
        return None
    paths: dict[str, list[str]] = {}
    labels = []
    for stretch in found:
        left, right = (min(1.0, max(0.0, x.place(step))) for step in (stretch.begin, stretch.end))
        if right <= left:
            continue
        begin, wide = round(left * UNITS), max(1, round(right * UNITS) - round(left * UNITS))
        kind = colour(stretch.attempt - 1) if stretch.attempt > 0 else "none"
        paths.setdefault(kind, []).append(f"M{begin} 0h{wide}v10h-{wide}z")
        if stretch.attempt > 0 and right - left >= LEAST_LABEL:
            text = f"{stretch.attempt}{'*' * changed(stretch.attempt)}"
            labels.append(element("span", text, style=f"left:{left:.2%};width:{right - left:.2%}"))
    about = "The attempts by their colours"
    parts = (element("path", d="".join(path), class_=f"of {kind}") for kind, path in paths.items())
    svg = element(
        "svg", element("title", about), *parts,
        viewBox=f"0 0 {UNITS} 10", preserveAspectRatio="none", role="img", aria_label=about,
    )  # fmt: skip
    return element("div", svg, *labels, class_="strip")


def marks(found: Sequence[Mark], x: Scale) -> Markup | None:
    """Put the marks below the axis, each with the number of its attempt where there is room; None without marks."""
    groups: list[tuple[float, list[Mark]]] = []
    for mark in sorted(found, key=_at):
        place = x.place(mark.at)
        if not 0 <= place <= 1:
            continue
        if groups and place < groups[-1][0] + GLYPH * len(_glyphs(groups[-1][1])):
            groups[-1][1].append(mark)
        else:
            groups.append((place, [mark]))
    made = []
    for number, (place, group) in enumerate(groups):
        until = groups[number + 1][0] if number + 1 < len(groups) else 1 + GLYPH
        attempts = {mark.attempt for mark in group}
        label = str(attempts.pop() or "") if len(attempts) == 1 else ""
        glyphs = _glyphs(group)
        room = place + GLYPH * len(glyphs) + DIGIT * len(label) <= until
        made.append(
            element(
                "span",
                element("b", glyphs),
                element("i", label) if room and label else None,
                class_="at",
                style=f"left:{place:.2%}",
            )
        )
    return join(*made) if made else None


def _glyphs(group: Sequence[Mark]) -> str:
    return "".join(dict.fromkeys(mark.glyph for mark in group))


def _at(mark: Mark) -> float:
    return mark.at
