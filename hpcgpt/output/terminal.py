"""Text of models, corpora and file names, made safe to print.

Escape sequences can clear a terminal's screen, change its title or make it send input; direction marks change the order
in which text is shown. Such characters are printed as ``\\x1b`` or ``\\u202e``.

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
    r"""Escape each control character of `text` as Python does, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if is_control(c) and c not in keep else c for c in text)


def shown(text: str) -> str:
    """Escape a text of several lines for a terminal or a log: line ends and tabs stay."""
    return printable(text, keep="\n\t")


def for_stdout(text: str) -> str:
    """Prepare a model's or a corpus's text for stdout: as `shown` on a terminal, unchanged into a file or a pipe."""
    return shown(text) if sys.stdout.isatty() else text
