"""The rows of a metrics.jsonl of any size as at most MOST columns, each with the extremes and the mean of its steps.

A column is a range of steps of one attempt. The blocks of a run (hpcgpt.run.blocks) are read once; whenever there are
more than MOST columns, all become twice as wide. So memory and the size of a page do not depend on the length of a run,
and a spike of a single step is in the maximum of its column, however wide that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcgpt.run import blocks
from hpcgpt.run.blocks import CURVES, Blocks

MOST = 800  # columns; a chart is about a thousand pixels wide

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """One metric, a value for each column; NaN where none of its steps has a finite one."""

    low: Floats
    high: Floats
    total: Floats
    count: Integers

    @property
    def mean(self) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.total / self.count)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which columns have a value."""
        return self.count > 0

    def part(self, which: Any) -> Curve:
        """Return some columns."""
        return Curve(self.low[which], self.high[which], self.total[which], self.count[which])


@dataclass(frozen=True)
class Columns:
    """The columns in the order of their steps. `first`, `last`: its steps; `tokens`: of the run after its last step.

    `attempt` is -1 where it is not known. `width`: how many steps a column may have.
    """

    width: int
    attempt: Integers
    first: Integers
    last: Integers
    tokens: Floats
    curves: dict[str, Curve]

    def __len__(self) -> int:
        return len(self.first)

    def part(self, which: Any) -> Columns:
        """Return some columns."""
        curves = {name: curve.part(which) for name, curve in self.curves.items()}
        taken = (self.attempt[which], self.first[which], self.last[which], self.tokens[which])
        return Columns(self.width, *taken, curves)

    def newest_mean(self, metric: str, least: int) -> tuple[float | None, int]:
        """Return the mean of the newest values of a metric, and of how many: `least`, or some more to fill a column."""
        curve = self.curves[metric]
        counts = np.cumsum(curve.count[::-1])
        taken = int(np.searchsorted(counts, least)) + 1
        number = int(curve.count[-taken:].sum())
        return (float(curve.total[-taken:].sum()) / number if number else None), number

    def tokens_at(self, step: float) -> float:
        """Return how many tokens the run had trained on after a step, between columns in proportion."""
        known = np.isfinite(self.tokens)
        if not known.any():
            return float("nan")
        steps: list[float] = [0.0, *self.last[known].tolist()]
        tokens: list[float] = [0.0, *self.tokens[known].tolist()]
        if step > steps[-1]:
            return tokens[-1] * step / steps[-1]
        return float(np.interp(step, steps, tokens))


class Gatherer:
    """Makes columns of the blocks that `add` gets; their steps must increase."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._found = _of_blocks(blocks.of_rows([]))

    @property
    def columns(self) -> Columns:
        return self._found

    def add(self, found: Blocks) -> None:
        self._found = narrowed(_joined(self._found, _of_blocks(found)), self._most)


def narrowed(columns: Columns, most: int) -> Columns:
    """Merge neighbours until there are at most `most` columns.

    Attempts are kept apart, unless there are more changes of attempt than that: then a column may have several, and
    its attempt is not known.
    """
    if not len(columns):
        return columns
    merged, last = _merged(columns, columns.width), int(columns.last[-1])
    while len(merged) > most and merged.width <= last:
        merged = _merged(merged, merged.width * 2)
    if len(merged) > most:
        merged = narrowed(_without_attempts(columns), most)
    return merged


def _of_blocks(found: Blocks) -> Columns:
    """Make a column of each block."""
    curves = {name: Curve(*(found[name][field] for field in ("low", "high", "total", "count"))) for name in CURVES}
    return Columns(1, found["attempt"], found["first"], found["last"], found["tokens"], curves)


def _joined(one: Columns, other: Columns) -> Columns:
    """Append columns to others, which have lower steps."""
    return Columns(
        max(one.width, other.width),
        np.concatenate([one.attempt, other.attempt]),
        np.concatenate([one.first, other.first]),
        np.concatenate([one.last, other.last]),
        np.concatenate([one.tokens, other.tokens]),
        {name: _appended(one.curves[name], other.curves[name]) for name in CURVES},
    )


def _appended(one: Curve, other: Curve) -> Curve:
    return Curve(
        np.concatenate([one.low, other.low]),
        np.concatenate([one.high, other.high]),
        np.concatenate([one.total, other.total]),
        np.concatenate([one.count, other.count]),
    )


def _merged(columns: Columns, width: int) -> Columns:
    """Merge the columns of one attempt that are in the same range of `width` steps."""
    ranges = (columns.first - 1) // width
    new = np.ones(len(columns), dtype=bool)
    new[1:] = (ranges[1:] != ranges[:-1]) | (columns.attempt[1:] != columns.attempt[:-1])
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(columns)) - 1
    curves = {
        name: Curve(
            np.fmin.reduceat(curve.low, starts), np.fmax.reduceat(curve.high, starts),
            np.add.reduceat(curve.total, starts), np.add.reduceat(curve.count, starts),
        )
        for name, curve in columns.curves.items()
    }  # fmt: skip
    return Columns(
        width, columns.attempt[starts], columns.first[starts], columns.last[ends], columns.tokens[ends], curves
    )


def _without_attempts(columns: Columns) -> Columns:
    return Columns(1, np.full(len(columns), -1), columns.first, columns.last, columns.tokens, columns.curves)
