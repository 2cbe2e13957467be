"""HTML that cannot be injected into: every text is escaped where it becomes a part of the page.

`element` is the only way to make a tag, and escapes all children and attributes that are not `Markup` already. So a
text of a run folder, such as a name, a sample or an event, stays text, whatever is in it.
"""

from __future__ import annotations

import html
from typing import TypeAlias

from hpcgpt.output import terminal


class Markup(str):
    """HTML that is finished: `element` and `text` made it."""


Child: TypeAlias = "str | int | float | Markup | None"

EMPTY = Markup("")
MOST_CHARACTERS = 200  # of a value in a table
COLOURS = 8  # of attempts or runs, in style.css: c0 to c7
_VOID = ("br", "meta", "col", "path", "rect")  # without children


def text(value: object) -> Markup:
    """Escape a text; control characters and marks that reorder text are shown as in Python (``\\x1b``)."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(terminal.shown(str(value)), quote=True))


def colour(number: int) -> str:
    """Return the class of attempt or run `number`, counted from 0, in style.css."""
    return f"c{number % COLOURS}"


def cut(value: str) -> str:
    """Cut off a text that is too long for a table."""
    return value if len(value) <= MOST_CHARACTERS else f"{value[: MOST_CHARACTERS - 1]}…"


def element(name: str, /, *children: Child, **attributes: object) -> Markup:
    """Make a tag. `class_` becomes class, `aria_label` aria-label; an attribute that is None is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID and not children:
        return Markup(f"<{name}{shown}>" if name in ("br", "meta", "col") else f"<{name}{shown}/>")
    return Markup(f"<{name}{shown}>{''.join(text(child) for child in children if child is not None)}</{name}>")


def join(*parts: Child) -> Markup:
    """Put parts one after the other."""
    return Markup("".join(text(part) for part in parts if part is not None))


def table(
    head: list[Child], rows: list[list[Child]], caption: str, numbers: tuple[int, ...] = (), texts: tuple[int, ...] = ()
) -> Markup:
    """Make a table that scrolls by itself where it is wider than the page.

    Columns `numbers` are aligned right; only the columns `texts` have lines that are broken.
    """

    def cells(kind: str, values: list[Child]) -> Markup:
        made = [
            element(
                kind, value, class_="n" if column in numbers else "w" if column in texts else None,
                scope="col" if kind == "th" else None,
            )
            for column, value in enumerate(values)
        ]  # fmt: skip
        return element("tr", *made)

    body = element("tbody", *(cells("td", row) for row in rows))
    inner = element("table", element("caption", caption), element("thead", cells("th", head)), body)
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)
