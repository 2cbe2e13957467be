"""How an option is declared: a field of a frozen dataclass with its default, help and bounds."""

from __future__ import annotations

from dataclasses import field
from functools import cache
from typing import Any, get_type_hints


def option(
    default: Any,
    about: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """Declare an option: its default, its help, its bounds (``low <= value <= high``, ``above < value < below``), and
    whether it is a `path`.
    """
    metadata = {"help": about, "low": low, "above": above, "high": high, "below": below, "path": path}
    return field(default=default, metadata=metadata)


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Return the type of each field of a dataclass. Its annotations are text, which takes long to evaluate again."""
    return get_type_hints(cls)
