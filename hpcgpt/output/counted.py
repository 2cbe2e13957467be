"""A number with the word for what it counts: "1 rank", "2 ranks"."""

from __future__ import annotations


def counted(number: int, one: str, several: str = "") -> str:
    """Return the number with its word; `several` is the plural where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"
