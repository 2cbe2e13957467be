"""A chart: curves in an SVG that fits any width, with axes as text beside it, which keeps its size on a phone.

The SVG has 1000 by 1000 units and is stretched to the room there is; lines keep their thickness. A curve is the mean of
each column (hpcgpt.report.columns), on a band between the extremes of the column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hpcgpt.report.columns import Columns, Curve
from hpcgpt.report.markup import Child, Markup, colour, element, join, table
from hpcgpt.report.scale import Scale, short

UNITS = 1000
TABLE_ROWS = 12
TICKS = 6
MOST_DOTS = 120


@dataclass(frozen=True)
class Line:
    """One curve. `colour` is a class of style.css; `dots`: mark each of its values."""

    name: str
    columns: Columns
    metric: str
    colour: str
    dots: bool = False
    by_attempt: bool = False

    @property
    def curve(self) -> Curve:
        return self.columns.curves[self.metric]


@dataclass(frozen=True)
class Chart:
    """What a chart shows. `along` gives the places on the x axis of columns; `below` a second text for a tick there.

    `strip` and `marks`: see hpcgpt.report.strip. `level`: a value that gets a dashed line, if it is on the y axis.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    x: Scale
    y: Scale
    x_names: Sequence[str] = ("step",)
    strip: Markup | None = None
    marks: Markup | None = None
    level: float | None = None
    along: Callable[[Columns], np.ndarray] = field(default=lambda columns: (columns.first + columns.last) / 2)
    below: Callable[[float], str] = field(default=lambda _: "")

    def html(self) -> Markup:
        """Draw it."""
        caption = element("figcaption", element("b", self.title), " ", element("small", self.unit))
        described = ", ".join(line.name for line in self.lines)
        label = f"{self.title} ({self.unit}) by {self.x_names[0]}: {described}. The figures are in the table below it."
        inside = join(*self._grid(), *(part for line in self.lines for part in self._line(line)), self._level())
        svg = element(
            "svg", element("title", self.title), element("desc", label), inside, viewBox=f"0 0 {UNITS} {UNITS}",
            preserveAspectRatio="none", role="img", aria_label=label,
        )  # fmt: skip
        area = element("div", self.strip, svg, self.marks, class_="area")
        kind = f"plot{' stripped' if self.strip else ''}{' marked' if self.marks else ''}"
        plot = element("div", self._y_labels(), area, self._x_labels(), class_=kind)
        return element("figure", caption, plot, self._table(), class_="chart")

    def _x(self, value: float) -> float:
        return self.x.place(value) * UNITS

    def _y(self, value: float) -> float:
        return (1 - min(1.0, max(0.0, self.y.place(value)))) * UNITS

    def _grid(self) -> list[Markup]:
        rows = "".join(f"M0 {self._y(tick):.0f}H{UNITS}" for tick in self.y.ticks())
        columns = "".join(f"M{self._x(tick):.0f} 0V{UNITS}" for tick in self.x.ticks(TICKS + 1))
        return [element("path", d=rows + columns, class_="grid")]

    def _line(self, line: Line) -> list[Markup]:
        """Draw a curve, in pieces of one colour."""
        made = []
        for columns, kind in _pieces(line):
            x = np.array([round(self._x(value)) for value in self.along(columns)])
            curve = columns.curves[line.metric]
            if (columns.width > 1 or (columns.first != columns.last).any()) and not line.dots:
                made += self._band(x, curve, kind)
            places = [round(self._y(value)) for value in curve.mean]
            path = _path(list(zip(x.tolist(), places, strict=True)))
            made.append(element("path", element("title", line.name), d=path, class_=f"line {kind}"))
            if line.dots:
                made.append(self._dots(line, columns, x, places, kind))
        return made

    def _band(self, x: np.ndarray, curve: Curve, kind: str) -> list[Markup]:
        """Draw the area between the extremes; it has an edge, so that one column alone can be seen."""
        top = list(zip(x.tolist(), (round(self._y(v)) for v in curve.high), strict=True))
        bottom = list(zip(x.tolist(), (round(self._y(v)) for v in curve.low), strict=True))
        if len(top) == 1:
            bottom = [(bottom[0][0] + 1, bottom[0][1])]
        return [element("path", d=_path([*top, *reversed(bottom)]) + "z", class_=f"band {kind}")]

    def _dots(self, line: Line, columns: Columns, x: np.ndarray, y: Sequence[int], kind: str) -> Markup:
        """Draw a dot at each value, with its figures; at most MOST_DOTS of them."""
        every = max(1, math.ceil(len(x) / MOST_DOTS))
        shown = [*range(0, len(x) - 1, every), len(x) - 1]
        curve = columns.curves[line.metric]
        return join(*(
            element("path", element("title", f"{line.name} {curve.mean[n]:.4f} at step {_steps(columns, n)}"),
                    d=f"M{x[n]} {y[n]}h0", class_=f"dot {kind}")
            for n in shown
        ))  # fmt: skip

    def _level(self) -> Markup | None:
        if self.level is None or not self.y.low <= self.level <= self.y.high:
            return None
        return element("path", d=f"M0 {self._y(self.level):.0f}H{UNITS}", class_="level")

    def _y_labels(self) -> Markup:
        labels = [element("span", short(tick), style=f"top:{self._y(tick) / UNITS:.2%}") for tick in self.y.ticks()]
        return element("div", *labels, class_="y", aria_hidden="true")

    def _x_labels(self) -> Markup:
        """Label the x axis. Every second label is left out where there is little room."""
        ticks = self.x.ticks(TICKS + 1)
        spans = []
        for number, tick in enumerate(ticks):
            below = self.below(tick)
            inside: list[Child] = [short(tick), element("i", below)] if below else [short(tick)]
            place = self.x.place(tick)
            edge = " first" if place < 0.03 else " last" if place > 0.97 else ""
            spans.append(element("span", *inside, style=f"left:{place:.2%}", class_=f"{'odd' * (number % 2)}{edge}"))
        names = element("div", *(element("span", name) for name in self.x_names), class_="of", aria_hidden="true")
        return join(names, element("div", *spans, class_="x", aria_hidden="true"))

    def _table(self) -> Markup | None:
        """Return the figures that the curves are drawn from, at some steps."""
        rows: list[list[Child]] = []
        for line in self.lines:
            known = np.flatnonzero(line.curve.known)
            if not len(known):
                continue
            chosen = known[np.unique(np.linspace(0, len(known) - 1, TABLE_ROWS).round().astype(int))]
            for n in chosen.tolist():
                figures = (line.curve.mean[n], line.curve.low[n], line.curve.high[n])
                rows.append([line.name, _steps(line.columns, n), *(f"{figure:.5g}" for figure in figures)])
        if not rows:
            return None
        head: list[Child] = ["curve", "steps", "mean", "minimum", "maximum"]
        inner = table(head, rows, f"{self.title}, {self.unit}", numbers=(1, 2, 3, 4))
        return element("details", element("summary", "Table"), inner)


def _pieces(line: Line) -> list[tuple[Columns, str]]:
    """Divide a curve into pieces without gaps, each of one attempt if its attempts are coloured."""
    known = np.flatnonzero(line.curve.known)
    if not len(known):
        return []
    breaks = np.zeros(len(known), dtype=bool)
    attempt = line.columns.attempt[known]
    if line.by_attempt:
        breaks[1:] |= attempt[1:] != attempt[:-1]
    if not line.dots:
        breaks[1:] |= np.diff(known) > 1
    pieces = np.split(known, np.flatnonzero(breaks))
    found = []
    for number, piece in enumerate(pieces):
        of = int(attempt[breaks.cumsum() == number][0])
        chosen = colour(max(0, of - 1)) if line.by_attempt else line.colour
        found.append((line.columns.part(piece), chosen))
    return found


def _steps(columns: Columns, number: int) -> str:
    """Name the steps of a column."""
    first, last = int(columns.first[number]), int(columns.last[number])
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _path(points: Sequence[tuple[int, int]]) -> str:
    """Return the commands of a path; relative ones are short. Points on a level line are left out."""
    before = points[0]
    made = [f"M{before[0]} {before[1]}"]
    for number, (x, y) in enumerate(points[1:], start=1):
        level = number + 1 < len(points) and before[1] == y == points[number + 1][1]
        if level and before[0] <= x <= points[number + 1][0]:
            continue
        made.append(f"l{x - before[0]}{'' if y < before[1] else ' '}{y - before[1]}")
        before = (x, y)
    return "".join(made) + ("h1" if len(made) == 1 else "")
