"""Bars: what the time of a run was spent on, and when its attempts ran."""

from __future__ import annotations

import time
from typing import Any

from hpcgpt.report.markup import Child, Markup, colour, element, join, table
from hpcgpt.run.goodput import SHOWN, Goodput
from hpcgpt.status.figures import span

UNITS = 1000
LEAST_SHARE = 0.0005  # of a kind of time that gets a part of the bar
MOST_ENTRIES = 500


def goodput(found: Goodput) -> Markup:
    """Draw what the time was spent on, and a table of it."""
    if found.goodput is None:
        return element("p", "Nothing has been trained yet.")
    seconds, total_s = found.seconds, found.total_s
    parts, keys, at = [], [], 0.0
    rows: list[list[Child]] = []
    for name, label in SHOWN.items():
        share = seconds[name] / total_s if total_s else 0.0
        kind = name.removesuffix("_s").replace("_", "-")
        of_active = f"{seconds[name] / found.active_s:.1%}" if name != "idle_s" else ""
        if share >= LEAST_SHARE:
            words = f"{label} {span(seconds[name])}{f', {of_active}' if of_active else ''}"
            parts.append(
                element("rect", element("title", words), x=f"{at * UNITS:.1f}", y=0, width=f"{share * UNITS:.1f}",
                        height=UNITS, class_=f"g-{kind}")
            )  # fmt: skip
            keys.append(element("li", element("i", class_=f"key g-{kind}"), words))
        at += share
        if seconds[name] > 0:
            rows.append([label, f"{seconds[name]:,.1f}", of_active or "not counted"])
    rows.append(["total", f"{total_s:,.1f}", ""])
    label = f"Goodput {found.goodput:.1%}: {found.line()}"
    svg = element("svg", element("title", label), *parts, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none",
                  role="img", aria_label=label, class_="bar")  # fmt: skip
    inner = table(["time", "seconds", "of the time with a job"], rows, "What the time was spent on", numbers=(1, 2))
    return join(svg, element("ul", *keys, class_="legend"), element("details", element("summary", "Table"), inner))


def attempts_in_time(history: list[dict[str, Any]]) -> Markup | None:
    """Draw when each attempt ran; None if there is only one moment."""
    shown = history[-MOST_ENTRIES:]
    if not shown:
        return None
    first = min(float(entry["began_at"]) for entry in shown)
    last = max(float(entry["ended_at"]) for entry in shown)
    if last <= first:
        return None
    parts = []
    for entry in shown:
        begin = (float(entry["began_at"]) - first) / (last - first) * UNITS
        width = max(1.5, (float(entry["ended_at"]) - float(entry["began_at"])) / (last - first) * UNITS)
        number = entry["attempt"]
        name = f"attempt {number}" if number is not None else "a start without ranks"
        words = f"{name}: {moment(entry['began_at'])}, {span(entry['ended_at'] - entry['began_at'])}; {entry['reason']}"
        shade = colour(number - 1) if number else "none"
        parts.append(
            element("rect", element("title", words), x=f"{begin:.1f}", y=0, width=f"{width:.1f}", height=UNITS,
                    class_=f"run {shade}")
        )  # fmt: skip
    label = f"When the attempts ran, from {moment(first)} to {moment(last)}"
    svg = element("svg", element("title", label), *parts, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none",
                  role="img", aria_label=label, class_="bar thin")  # fmt: skip
    ends = element("p", element("span", moment(first)), element("span", moment(last)), class_="ends")
    return join(svg, ends)


def moment(at: float) -> str:
    """Format a local time."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    except (OverflowError, ValueError, OSError):
        return "?"
