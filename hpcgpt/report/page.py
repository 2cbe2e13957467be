"""The page: one HTML file with its style in it, no script, and nothing that is loaded from elsewhere.

Its Content-Security-Policy forbids scripts and everything from other places, should an escape ever be missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpcgpt.report import bars, charts, sections
from hpcgpt.report.facts import Facts
from hpcgpt.report.markup import Markup, element, join

MADE_BY = "hpcgpt report"
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = Path(__file__).with_name("style.css")


def page(runs: Sequence[Facts], unreadable: Sequence[tuple[str, str]], now: float) -> str:
    """Compose the page of one run or several. `unreadable`: runs that cannot be read, and why."""
    body = [_one(runs[0])] if len(runs) == 1 else _several(runs)
    if unreadable:
        items = element("ul", *(element("li", f"{name}: {why}") for name, why in unreadable))
        body.insert(0, element("div", element("b", "Not readable:"), items, class_="problems"))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    made = element("footer", f"Made by hpcgpt report, {bars.moment(now)}, from the files of the run folder.")
    parts = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=MADE_BY),
        element("title", f"{title} – hpcgpt"),
        element("style", Markup(STYLE.read_text(encoding="utf-8"))),
    ]
    document = element("html", element("head", *parts), element("body", element("main", *body, made)), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _one(run: Facts) -> Markup:
    return join(
        sections.head(run),
        sections.problems(run),
        sections.section("Curves", charts.of_one(run)),
        sections.time_spent(run),
        sections.attempts(run),
        sections.faults(run),
        sections.samples(run),
        sections.checkpoints(run),
        sections.what_next(run),
        sections.settings(run),
        sections.versions(run),
    )


def _several(runs: Sequence[Facts]) -> list[Markup]:
    made = [
        element("header", element("h1", f"{len(runs)} runs"), sections.overview(runs)),
        sections.section("Curves", charts.of_several(runs)),
        sections.differences(runs),
    ]
    for number, run in enumerate(runs):
        inner = join(sections.head(run), sections.problems(run), sections.time_spent(run), sections.attempts(run),
                     sections.faults(run), sections.what_next(run))  # fmt: skip
        made.append(element("details", element("summary", run.name), inner, id=f"run{number}", class_="one"))
    return made
