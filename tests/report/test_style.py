"""hpcgpt.report's style.css: contrast as WCAG 2.1 asks for it, in both themes and on paper."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from hpcgpt.report.markup import COLOURS
from hpcgpt.report.page import STYLE

CSS = STYLE.read_text(encoding="utf-8")
ATTEMPTS = [f"c{number}" for number in range(COLOURS)]
TEXT, GRAPHIC = 4.5, 3.0  # https://www.w3.org/TR/WCAG21/#contrast-minimum and #non-text-contrast
LIGHT, DARK, PAPER = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
)


def linear(colour: str) -> tuple[float, float, float]:
    parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return red, green, blue


def luminance(colour: str) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def difference(one: str, other: str) -> float:
    """Return the distance of two colours in CIELAB, white point D65; about 2 can just be seen."""

    def lab(colour: str) -> tuple[float, float, float]:
        red, green, blue = linear(colour)
        xyz = (0.4124 * red + 0.3576 * green + 0.1805 * blue, luminance(colour),
               0.0193 * red + 0.1192 * green + 0.9505 * blue)  # fmt: skip
        x, y, z = (part / white for part, white in zip(xyz, (0.9505, 1.0, 1.089), strict=True))
        x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in (x, y, z))
        return 116 * y - 16, 500 * (x - y), 200 * (y - z)

    return math.dist(lab(one), lab(other))


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_texts_and_curves_stand_out_from_the_page(theme: str) -> None:
    colours = {"light": LIGHT, "dark": DARK, "paper": LIGHT | PAPER}[theme]
    for name in ("text", "quiet", "accent", "fault", "good", "warn"):
        for ground in ("page", "soft"):
            assert contrast(colours[name], colours[ground]) >= TEXT, (name, ground)
    for name in (*ATTEMPTS, "val"):
        assert contrast(colours[name], colours["page"]) >= GRAPHIC, name


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_eight_attempts_differ_from_each_other_and_from_faults(theme: dict[str, str]) -> None:
    assert len(ATTEMPTS) >= 8
    for one, other in itertools.combinations((*ATTEMPTS, "fault", "val"), 2):
        assert difference(theme[one], theme[other]) > 30, (one, other)


def test_a_dot_at_the_edge_of_a_chart_is_whole() -> None:
    rule = re.search(r"\.area > svg \{(.*?)\}", CSS)
    assert rule
    assert "overflow: visible" in rule[1]


def test_the_key_of_validation_is_a_dashed_line_with_a_dot() -> None:
    rule = re.search(r"i\.key\.val \{(.*?)\}", CSS)
    assert rule
    assert "radial-gradient(circle" in rule[1]
    assert "repeating-linear-gradient" in rule[1]


def test_the_style_loads_nothing_and_uses_no_unknown_colour() -> None:
    assert not re.search(r"url\(|@import|https?:", CSS)
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) - {"k", "height", "marks"} <= LIGHT.keys()
    assert LIGHT.keys() == DARK.keys()
