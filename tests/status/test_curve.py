"""hpcgpt.status.curve: the loss of a metrics.jsonl of any size, drawn with characters."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from hpcgpt.status import curve
from hpcgpt.status.curve import Dots, LossCurve, dots_for, draw


def row(step: int, loss: float | None = None, **more: object) -> str:
    return json.dumps({"step": step, "time": 1.0, "train/loss": 1.0 / step if loss is None else loss, **more}) + "\n"


def test_it_follows_a_file_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    found = LossCurve(path)
    found.refresh()
    assert found.points == []
    path.write_text(row(1) + row(2))
    found.refresh()
    assert found.points == [(1, 1.0), (2, 0.5)]
    half = row(3)
    with open(path, "a") as file:
        file.write(half[:9])
    found.refresh()
    with open(path, "a") as file:
        file.write(half[9:] + row(4))
    found.refresh()
    assert [step for step, _ in found.points] == [1, 2, 3, 4]


def test_a_file_that_was_replaced_or_truncated_is_read_again(tmp_path: Path) -> None:
    """A resumed run makes a new file, without the rows after its checkpoint."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step) for step in range(1, 9)))
    found = LossCurve(path)
    found.refresh()
    other = tmp_path / "new"
    other.write_text(row(1, 7.0) + row(2, 7.0) + " " * 10_000 + "\n")
    os.replace(other, path)
    found.refresh()
    assert found.points == [(1, 7.0), (2, 7.0)]
    path.write_text(row(1, 9.0))
    found.refresh()
    assert found.points == [(1, 9.0)]
    path.unlink()
    found.refresh()
    assert found.points == []


def test_damaged_lines_and_losses_that_are_not_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(row(1) + "{torn\n" + '{"step": 2, "time": 1, "train/loss": null}\n' + row(3, float("nan")) + "[]\n"
                    + row(4))  # fmt: skip
    found = LossCurve(path)
    found.refresh()
    assert [step for step, _ in found.points] == [1, 4]


def test_a_large_file_is_read_at_some_places_and_followed_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "WHOLE_BYTES", 20_000)
    monkeypatch.setattr(curve, "SAMPLES", 50)
    monkeypatch.setattr(curve, "MOST_POINTS", 200)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(row(step, text="x" * 50) for step in range(1, 10_001)))
    found = LossCurve(path)
    found.refresh()
    steps = [step for step, _ in found.points]
    assert (steps[0], steps[-1]) == (1, 10_000)
    assert 50 <= len(steps) <= 200
    assert max(after - before for before, after in itertools.pairwise(steps)) < 300
    for step in range(10_001, 10_500):
        with open(path, "a") as file:
            file.write(row(step))
        found.refresh()
    steps = [step for step, _ in found.points]
    assert steps[-1] in (10_498, 10_499)
    assert (steps[0], len(steps) <= 200) == (1, True)


FALLING = [(step, 10.0 - step) for step in range(10)]


@pytest.mark.parametrize(
    ("dots", "expected"),
    [
        ("ascii", ["   10.00 |*",
                   "         | ***",
                   "    5.50 |    **",
                   "         |      ***",
                   "    1.00 |         *",
                   "          0   step 9"]),
        ("blocks", ["   10.00 │▀▄",
                    "         │ ▀▀▄",
                    "    5.50 │    ▀▄",
                    "         │      ▀▄▄",
                    "    1.00 │        ▀▄",
                    "          0   step 9"]),
    ],
)  # fmt: skip
def test_a_falling_line(dots: Dots, expected: list[str]) -> None:
    drawn = draw(FALLING, 20, 6, dots)
    assert [line[:9] for line in drawn] == [line[:9] for line in expected]
    assert drawn[-1] == expected[-1]
    columns = [max(number for number, line in enumerate(drawn[:-1]) if len(line) > 10 + column
                   and line[10 + column] != " ") for column in range(10)]  # fmt: skip
    assert columns == sorted(columns)
    assert (columns[0], columns[-1]) == (0, 4)


def test_braille_has_eight_dots_a_character() -> None:
    drawn = draw(FALLING, 15, 3, "braille")
    assert [line[:10] for line in drawn] == ["   10.00 │", "    1.00 │", "          "]
    dots = sum((ord(letter) - 0x2800).bit_count() for line in drawn for letter in line if letter > "⠀")
    assert dots == 10
    assert set("".join(drawn[:-1])) - set("0123456789 │.") <= {chr(0x2800 + bits) for bits in range(1, 256)}


def test_labels_have_as_many_places_as_the_range_needs() -> None:
    narrow = [(step, 3.0001 + 0.00004 * step) for step in range(2)]
    assert [line.split()[0] for line in draw(narrow, 40, 6, "ascii")][::2] == ["3.000140", "3.000120", "3.000100"]


def test_labels_of_a_loss_that_has_diverged_keep_its_size() -> None:
    lines = draw([(1, 3.0), (2, 1_234_567_891.0)], 40, 6, "ascii")
    assert [float(lines[number].split()[0]) for number in (0, 4)] == [pytest.approx(1_234_567_891, rel=0.01), 3.0]


def test_every_size_is_drawn_within_it() -> None:
    for dots in ("braille", "blocks", "ascii"):
        for width in range(1, 60, 7):
            for height in range(12):
                drawn = draw(FALLING, width, height, dots)
                assert len(drawn) <= max(height, 0)
                assert all(len(line) <= max(width, 20) for line in drawn)


def test_a_constant_loss_and_too_few_points_can_be_drawn() -> None:
    assert len(draw([(1, 2.0), (2, 2.0)], 40, 8, "ascii")) == 8
    assert draw([(1, 2.0)], 40, 8, "ascii") == ["(no curve yet: fewer than two steps)"]
    assert draw([], 40, 8, "ascii") == ["(no curve yet: fewer than two steps)"]


@pytest.mark.parametrize(
    ("encoding", "terminal", "dots"),
    [("utf-8", "xterm-256color", "braille"), ("UTF-8", "tmux", "braille"), ("utf-8", "linux", "blocks"),
     ("ascii", "xterm", "ascii"), ("gbk", "xterm", "ascii"), (None, "", "ascii")],
)  # fmt: skip
def test_the_finest_dots_that_a_terminal_has(encoding: str | None, terminal: str, dots: str) -> None:
    assert dots_for(encoding, terminal) == dots
