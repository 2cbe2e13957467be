"""hpcgpt.report's style.css: contrast as WCAG 2.1 asks for it, in both themes and on paper."""

from __future__ import annotations

import re

import pytest

from hpcgpt.report.page import STYLE

CSS = STYLE.read_text(encoding="utf-8")
TEXT, GRAPHIC = 4.5, 3.0  # https://www.w3.org/TR/WCAG21/#contrast-minimum and #non-text-contrast
LIGHT, DARK, PAPER = (
    dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
)


def luminance(colour: str) -> float:
    parts = (int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_texts_and_curves_stand_out_from_the_page(theme: str) -> None:
    colours = {"light": LIGHT, "dark": DARK, "paper": LIGHT | PAPER}[theme]
    for name in ("text", "quiet", "accent", "fault", "good", "warn"):
        for ground in ("page", "soft"):
            assert contrast(colours[name], colours[ground]) >= TEXT, (name, ground)
    for name in (*(f"c{number}" for number in range(6)), "val"):
        assert contrast(colours[name], colours["page"]) >= GRAPHIC, name


def test_the_style_loads_nothing_and_uses_no_unknown_colour() -> None:
    assert not re.search(r"url\(|@import|https?:", CSS)
    assert set(re.findall(r"var\(--([\w-]+)\)", CSS)) - {"k"} <= LIGHT.keys()
    assert LIGHT.keys() == DARK.keys()
