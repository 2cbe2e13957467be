"""hpcgpt.report.columns: rows become columns, and no spike is lost."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from hpcgpt.report.columns import MOST, Columns, Gatherer, narrowed
from hpcgpt.run import blocks


def rows(steps: int, attempts: int = 1) -> list[dict[str, Any]]:
    generator = random.Random(steps)
    return [
        {"step": step, "time": float(step), "attempt": 1 + (step - 1) * attempts // steps, "tokens": step * 10,
         "train/loss": generator.uniform(2, 3), "train/lr": 1e-3}
        for step in range(1, steps + 1)
    ]  # fmt: skip


def gathered(found: list[dict[str, Any]], most: int = MOST, block: int = 997) -> Columns:
    gatherer = Gatherer(most)
    for start in range(0, len(found), block):
        gatherer.add(blocks.of_rows(found[start : start + block]))
    return gatherer.columns


@pytest.mark.parametrize("steps", [1, 2, 799, 800, 801, 12_345])
def test_columns_are_few_and_cover_every_step_once(steps: int) -> None:
    columns = gathered(rows(steps, attempts=min(steps, 7)))
    assert len(columns) <= MOST
    assert len(columns) > MOST / 4 or columns.width == 1
    assert columns.first[0] == 1
    assert columns.last[-1] == steps
    assert (columns.first[1:] == columns.last[:-1] + 1).all()
    assert columns.curves["train/loss"].count.sum() == steps


def test_each_column_has_the_extremes_and_the_mean_of_its_steps() -> None:
    found = rows(5000, attempts=3)
    columns = gathered(found, most=50)
    losses = np.array([row["train/loss"] for row in found])
    curve = columns.curves["train/loss"]
    for number in range(len(columns)):
        part = losses[columns.first[number] - 1 : columns.last[number]]
        assert curve.low[number] == part.min()
        assert curve.high[number] == part.max()
        assert curve.mean[number] == pytest.approx(part.mean())
        assert columns.tokens[number] == columns.last[number] * 10


@pytest.mark.parametrize("at", [1, 2, 4999, 7777, 9999])
def test_a_spike_of_a_single_step_stays(at: int) -> None:
    found = rows(10_000)
    found[at]["train/loss"] = 50.0
    found[at - 1]["train/loss"] = 0.5
    curve = gathered(found, most=20).curves["train/loss"]
    assert curve.high.max() == 50.0
    assert curve.low.min() == 0.5


def test_the_columns_do_not_depend_on_how_the_file_is_divided() -> None:
    found = rows(6000, attempts=4)
    one, other = gathered(found, block=6000), gathered(found, block=11)
    assert (one.first == other.first).all()
    assert (one.curves["train/loss"].high == other.curves["train/loss"].high).all()


def test_a_column_is_of_one_attempt() -> None:
    columns = gathered(rows(10_000, attempts=5), most=40)
    assert set(columns.attempt.tolist()) == {1, 2, 3, 4, 5}
    for attempt in range(1, 6):
        assert columns.first[columns.attempt == attempt].min() == (attempt - 1) * 2000 + 1


def test_more_attempts_than_columns_share_them() -> None:
    """A damaged file may even change its attempt at each step."""
    columns = gathered(rows(3000, attempts=3000), most=50)
    assert len(columns) <= 50
    assert columns.curves["train/loss"].count.sum() == 3000


def test_values_that_are_missing_leave_gaps() -> None:
    found = rows(10)
    del found[4]["train/loss"]
    curve = gathered(found).curves["train/loss"]
    assert curve.known.tolist() == [True] * 4 + [False] + [True] * 5
    assert math.isnan(curve.mean[4])


def test_tokens_between_columns_are_in_proportion() -> None:
    columns = narrowed(gathered(rows(1000)), 10)
    assert columns.tokens_at(500) == pytest.approx(5000)
    assert columns.tokens_at(0) == 0
    assert columns.tokens_at(2000) == pytest.approx(20_000)


@pytest.mark.parametrize(("steps", "least", "taken"), [(5, 20, 5), (100, 20, 20), (5000, 50, 56), (0, 20, 0)])
def test_the_mean_of_the_newest_steps(steps: int, least: int, taken: int) -> None:
    found = rows(steps)
    mean, number = gathered(found).newest_mean("train/loss", least)
    assert number == taken
    assert mean == (pytest.approx(np.mean([row["train/loss"] for row in found[-taken:]])) if taken else None)


def test_without_rows_there_are_no_columns() -> None:
    assert len(gathered([])) == 0
