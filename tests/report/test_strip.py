"""hpcgpt.report.strip: the strip of attempts above a chart, and the marks below its axis."""

from __future__ import annotations

import random
import re

import pytest

from hpcgpt.report import strip
from hpcgpt.report.columns import Gatherer
from hpcgpt.report.scale import Scale
from hpcgpt.report.strip import FAILED, WENT_BACK, Mark, Stretch
from hpcgpt.run import blocks

PHONE = 300  # pixels of a chart
WIDEST = 12.5, 7.5  # pixels of a glyph and of a digit, in DejaVu Sans


def labels(found: list[Mark], x: Scale) -> list[tuple[float, str]]:
    """Return the place of each label, as a fraction of the width, and its text."""
    shown = re.findall(r'style="left:([\d.]+)%">(.*?)</span>', strip.marks(found, x) or "")
    return [(float(left) / 100, re.sub("<.*?>", "", text)) for left, text in shown]


def test_stretches_are_the_neighbouring_steps_of_an_attempt() -> None:
    gatherer = Gatherer()
    gatherer.add(blocks.of_rows([{"step": n, "attempt": (1 if n <= 3 else 2 if n <= 7 else 5)} for n in range(1, 11)]))
    assert strip.stretches(gatherer.columns) == [Stretch(1, 0, 3), Stretch(2, 3, 7), Stretch(5, 7, 10)]
    assert strip.stretches(Gatherer().columns) == []


def test_the_strip_has_each_attempt_in_its_colour_and_a_star_for_changed_settings() -> None:
    drawn = strip.strip([Stretch(1, 0, 50), Stretch(2, 50, 51), Stretch(11, 51, 100)], {11}.__contains__, Scale(0, 100))
    assert drawn
    assert 'd="M0 0h500v10h-500z" class="of c0"' in drawn
    assert 'd="M500 0h10v10h-10z" class="of c1"' in drawn
    assert 'd="M510 0h490v10h-490z" class="of c2"' in drawn
    assert re.findall(r'left:([\d.]+)%;width:([\d.]+)%">(.*?)<', drawn) == [
        ("0.00", "50.00", "1"),
        ("51.00", "49.00", "11*"),
    ]


def test_the_strip_shows_only_what_is_on_the_axis_and_nothing_of_a_single_attempt() -> None:
    drawn = strip.strip([Stretch(1, 0, 50), Stretch(2, 50, 100)], set().__contains__, Scale(60, 100))
    assert drawn
    assert "c0" not in drawn
    assert 'd="M0 0h1000v10h-1000z" class="of c1"' in drawn
    assert strip.strip([Stretch(1, 0, 100)], set().__contains__, Scale(0, 100)) is None


def test_a_mark_has_its_glyph_and_the_number_of_its_attempt() -> None:
    found = [Mark(20, FAILED, 2, ""), Mark(50, WENT_BACK, 3, ""), Mark(70, FAILED, None, ""), Mark(170, FAILED, 4, "")]
    assert labels(found, Scale(0, 100)) == [(0.2, "▲2"), (0.5, "←3"), (0.7, "▲")]
    assert strip.marks([], Scale(0, 100)) is None


def test_marks_that_are_close_share_a_label() -> None:
    near = [Mark(20, FAILED, 2, ""), Mark(21, WENT_BACK, 2, ""), Mark(22, FAILED, 2, "")]
    assert labels(near, Scale(0, 100)) == [(0.2, "▲←2")]
    assert labels([Mark(20, FAILED, 2, ""), Mark(21, FAILED, 3, "")], Scale(0, 100)) == [(0.2, "▲")]


@pytest.mark.parametrize("number", [2, 10, 30, 500])
def test_labels_of_marks_never_overlap_nor_leave_the_page(number: int) -> None:
    generator = random.Random(number)
    found = [
        Mark(generator.uniform(0, 100), generator.choice((FAILED, WENT_BACK)), attempt, "")
        for attempt in range(1, number + 1)
    ]
    shown = labels(found, Scale(0, 100))
    assert shown
    free = -1.0
    for place, text in shown:
        assert place * PHONE >= free
        free = place * PHONE + sum(WIDEST[character.isdigit()] for character in text)
    assert free <= PHONE + 2 * WIDEST[0]
