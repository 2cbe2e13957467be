"""Text of models, corpora and file names, made safe to show.

A terminal obeys what it is sent: escape sequences clear the screen, change its title or answer as if they were typed;
direction marks show a text in another order than it is read. Such characters are shown as ``\\x1b`` or ``\\u202e``.

No torch in here.
"""

from __future__ import annotations

import sys
from unicodedata import category

# Bidirectional embeddings, overrides and isolates; letters of languages that are written from right to left are fine.
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c")


def is_control(character: str) -> bool:
    """Is it a control character (C0, DEL, C1), a mark that reorders text, a line separator, or half of a pair?"""
    return category(character) in ("Cc", "Zl", "Zp", "Cs") or character in _DIRECTION


def printable(text: str, keep: str = "") -> str:
    r"""`text` with each control character as Python writes it, but for those in `keep`."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if is_control(c) and c not in keep else c for c in text)


def shown(text: str) -> str:
    """A text of several lines for a terminal or a log: line ends and tabs stay."""
    return printable(text, keep="\n\t")


def for_stdout(text: str) -> str:
    """A model's or a corpus's text for stdout: as `shown` on a terminal, byte for byte into a file or a pipe."""
    return shown(text) if sys.stdout.isatty() else text
