"""Which charts a page has: those of one run, with its attempts coloured, or those of several runs over each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcgpt.report import scale
from hpcgpt.report.chart import Chart, Line
from hpcgpt.report.columns import Columns, narrowed
from hpcgpt.report.facts import Facts
from hpcgpt.report.markup import COLOURS, EMPTY, Markup, colour, cut, element, join
from hpcgpt.report.notes import notes
from hpcgpt.report.scale import Scale, short
from hpcgpt.report.strip import marks, stretches, strip
from hpcgpt.run import records

# metric, title, unit, whether the axis begins at zero
OTHERS = (
    ("train/lr", "Learning rate", "", True),
    ("train/grad_norm", "Gradient norm", "before clipping", False),
    ("train/tokens_per_s", "Throughput", "tokens a second", True),
)
LOSS, NATS = "Loss", "nats a token"
ZOOM = 4  # the second chart of the loss leaves out the first of so many parts of the steps
WORTH_A_ZOOM = 0.4  # of the range of all losses
ALL_COLUMNS = 2400  # of several runs together
LEAST_COLUMNS = 24
SMOOTH_COLUMNS = 120  # of throughput: that of single steps is a thicket
MOST_KEYS = 24  # of attempts, in the legend
MOST_LINES = 6  # of each kind below the legend
BAND = "A point of a curve stands for several steps: the line is their mean, the band from their minimum to maximum."


def of_one(run: Facts) -> Markup:
    """Draw the charts of one run."""
    columns = run.columns
    if len(columns) < 2:
        return element("p", "No curve yet: fewer than two steps.")
    x = Scale(0.0, float(columns.last[-1]))
    attempts, changes, faults = stretches(columns), _changes(run), run.marks

    def tokens(step: float) -> str:
        found = columns.tokens_at(step)
        return short(found) if step and math.isfinite(found) else ""

    def chart(
        title: str, unit: str, lines: Sequence[Line], along: Scale, y: Scale, level: float | None = None
    ) -> Markup:
        above, below = strip(attempts, changes.__contains__, along), marks(faults, along)
        return Chart(title, unit, lines, along, y, ("step", "tokens"), above, below, level, below=tokens).html()

    made = []
    losses = _losses(columns)
    if losses:
        axis = _axis(losses, steep=True)
        made.append(chart(LOSS, NATS, losses, x, axis))
        begin = int(columns.last[-1]) // ZOOM
        later = _losses(columns.part(columns.first > begin))
        if later and len(later[0].columns) > 2:
            near = _axis(later, steep=True)
            if not axis.logarithmic and near.high - near.low < WORTH_A_ZOOM * (axis.high - axis.low):
                made.append(chart(f"{LOSS} since step {begin:,}", NATS, later, Scale(float(begin), x.high), near))
    for metric, title, unit, zero in OTHERS:
        shown = columns
        if metric == "train/tokens_per_s":
            shown = narrowed(columns, max(SMOOTH_COLUMNS, 2 * len(attempts)))
            unit += ", of all ranks together" * ((run.status["world_size"] or 1) > 1)
            unit += f", a point for {shown.width:,} steps" * (shown.width > columns.width)
        line = Line(title.lower(), shown, metric, "c0", by_attempt=True)
        if not line.curve.known.any():
            continue
        axis = _axis([line], zero, steep=True)
        level = _clip(run) if metric == "train/grad_norm" else None
        if level is not None:
            unit += f" at {level:g}{' (dashed)' if axis.low <= level <= axis.high else ''}"
        made.append(chart(title, unit, [line], x, axis, level))
    note = element("p", BAND, class_="note") if columns.width > 1 else None
    return join(_legend_of_one(run), _course(run, changes), note, element("div", *made, class_="charts"))


def of_several(runs: Sequence[Facts]) -> Markup:
    """Draw the curves of several runs over each other."""
    most = max(LEAST_COLUMNS, ALL_COLUMNS // len(runs))
    shown = [(number, run, narrowed(run.columns, most)) for number, run in enumerate(runs) if len(run.columns) > 1]
    if not shown:
        return element("p", "No curve yet: no run has two steps.")
    last = max(float(columns.last[-1]) for _, _, columns in shown)
    made = []

    def chart(metric: str, title: str, unit: str, zero: bool = False, by_tokens: bool = False) -> None:
        lines = [
            Line(run.name, columns, metric, colour(number), dots=metric == "val/loss")
            for number, run, columns in shown if columns.curves[metric].known.any()
        ]  # fmt: skip
        if not lines:
            return
        if by_tokens:
            tokens = max(float(np.nanmax(line.columns.tokens)) for line in lines)
            x, names = Scale(0.0, tokens), ("tokens",)
        else:
            x, names = Scale(0.0, last), ("step",)
        drawn = Chart(title, unit, lines, x, _axis(lines, zero, steep=True), names)
        made.append((dataclasses.replace(drawn, along=_tokens) if by_tokens else drawn).html())

    chart("train/loss", "Training loss", NATS)
    chart("val/loss", "Validation loss", NATS)
    if _differ([columns for _, _, columns in shown]):
        chart("train/loss", "Training loss by tokens", NATS, by_tokens=True)
        chart("val/loss", "Validation loss by tokens", NATS, by_tokens=True)
    for metric, title, unit, zero in OTHERS:
        chart(metric, title, unit, zero)
    legend = element("ul", *(
        element("li", element("i", class_=f"key {colour(number)}"), run.name) for number, run in enumerate(runs)
    ), class_="legend")  # fmt: skip
    return join(legend, element("div", *made, class_="charts"))


def _losses(columns: Columns) -> list[Line]:
    """Return the curves of the loss that have values: of the training split, and of validation."""
    lines = [
        Line("training loss", columns, "train/loss", "c0", by_attempt=True),
        Line("validation loss", columns, "val/loss", "val", dots=True),
    ]
    return [line for line in lines if line.curve.known.any()]


def _axis(lines: Sequence[Line], from_zero: bool = False, steep: bool = False) -> Scale:
    lows = [float(value) for line in lines for value in line.curve.low[line.curve.known]]
    highs = [float(value) for line in lines for value in line.curve.high[line.curve.known]]
    return scale.around(lows, highs, from_zero, steep)


def _tokens(columns: Columns) -> np.ndarray:
    """Place columns by tokens."""
    return np.nan_to_num(columns.tokens)


def _differ(columns: Sequence[Columns]) -> bool:
    """Do the runs have different numbers of tokens in a step? Then steps alone compare nothing."""
    rates = [float(one.tokens[-1] / one.last[-1]) for one in columns]
    return all(map(math.isfinite, rates)) and max(rates) > min(rates) * 1.01


def _legend_of_one(run: Facts) -> Markup:
    """Explain the colours."""
    numbers = sorted({int(number) for number in run.columns.attempt if number > 0})
    items = [element("li", element("i", class_=f"key {colour(n - 1)}"), f"{n}") for n in numbers[:MOST_KEYS]]
    items.insert(0, element("li", f"attempt{'s' * (len(items) > 1)}"))
    if len(numbers) > MOST_KEYS:
        items.append(element("li", f"and {len(numbers) - MOST_KEYS:,} more"))
    if numbers and numbers[-1] > COLOURS:
        items.append(element("li", f"(colours repeat after {COLOURS})"))
    without = [
        entry["attempt"] for entry in run.status["history"] if entry["attempt"] and entry["attempt"] not in numbers
    ]
    if without and numbers:
        listed = ", ".join(map(str, without[:12])) + (", ..." if len(without) > 12 else "")
        items.append(element("li", f"no step of attempt{'s' * (len(without) > 1)} {listed} is part of the result"))
    if run.columns.curves["val/loss"].known.any():
        items.append(element("li", element("i", class_="key val"), "validation"))
    return element("ul", *items, class_="legend")


def _changes(run: Facts) -> dict[int, str]:
    """Return the changed settings of attempts, in words."""
    found = {}
    for note in notes(run.events):
        if note.kind == "changed" and note.attempt is not None:
            found[note.attempt] = f"{f'from step {note.step:,}: ' if note.step else ''}{cut(note.words)}"
    return found


def _course(run: Facts, changes: dict[int, str]) -> Markup:
    """Say what the stars and the marks of the charts stand for."""
    lines = [("*", "change", f"attempt {attempt}, {words}") for attempt, words in changes.items()]
    faults = [
        (mark.glyph, "fault", f"{f'attempt {mark.attempt}' if mark.attempt else 'the run'} {cut(mark.words)}")
        for mark in run.marks
    ]
    items = []
    for kind in (lines, faults):
        items += [
            element("li", element("b", glyph, class_=f"note-{weight}"), " ", words)
            for glyph, weight, words in kind[:MOST_LINES]
        ]
        if len(kind) > MOST_LINES:
            rest = f"and {len(kind) - MOST_LINES:,} more, in Attempts and in Faults and changes"
            items.append(element("li", element("b", kind[-1][0], class_=f"note-{kind[-1][1]}"), " ", rest))
    return element("ul", *items, class_="course") if items else EMPTY


def _clip(run: Facts) -> float | None:
    """Return the norm to which gradients are clipped; None if it is not known, or they are not."""
    found: Any = run.settings.get("optim.clip_norm")
    return float(found) if records.is_number(found) and found > 0 else None
