"""The table of every configuration key in docs/reference.md, made from the options themselves.

    python -m hpcgpt.config.reference docs/reference.md     write it into the page, between the two marks
    python -m hpcgpt.config.reference                       print it

A test compares the page with this table. No torch in here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w

from hpcgpt.config.option import types_of
from hpcgpt.config.options import Config, Part

BEGIN = "<!-- keys: made by `python -m hpcgpt.config.reference docs/reference.md` -->"
END = "<!-- end of keys -->"
_TYPES = {int: "integer", float: "number", bool: "true, false", str: "text"}
_BOUNDS = {"low": ">=", "above": ">", "high": "<=", "below": "<"}


def tables() -> str:
    """Return a section of Markdown for each section of the configuration."""
    parts = []
    for section, cls in types_of(Config).items():
        hints = types_of(cls)
        rows = [
            f"| `{item.name}` | {_type(hints[item.name], item.metadata)} | `{_shown(item.default)}` "
            f"| {_escaped(item.metadata['help'])} |"
            for item in dataclasses.fields(cls)
        ]
        parts.append(
            "\n".join([f"### [{section}]", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts)


def with_tables(page: str) -> str:
    """Return the page with the current tables between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _type(hint: Any, limits: Mapping[str, Any]) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if hint == tuple[Part, ...]:
        return "list of `{dir, weight}`"
    if hint == tuple[str, ...]:
        return "list of paths"
    bounds = [f"{sign} {_bound(limits[name])}" for name, sign in _BOUNDS.items() if limits[name] is not None]
    return _escaped(", ".join(["path" if limits["path"] else _TYPES[hint], *bounds]))


def _bound(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def _shown(value: Any) -> str:
    """Return a default as TOML."""
    return tomli_w.dumps({"key": list(value) if isinstance(value, tuple) else value}).removeprefix("key = ").strip()


def _escaped(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", r"\|").replace("<", "&lt;")


def main(argv: Sequence[str]) -> None:
    if not argv:
        print(tables())
    for name in argv:
        path = Path(name)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
