"""Which documents are held out for validation: those whose hash falls below the fraction.

The hash is of the text alone, so a document stays on its side when the corpus is reordered or grows,
and copies of one text are on one side.
"""

from __future__ import annotations

import hashlib


def is_validation(text: str, fraction: float) -> bool:
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < fraction * 2**64


def rule(fraction: float) -> str:
    """The rule in words, for the manifest."""
    return f"val if the first 8 bytes of SHA-256(text), as a big-endian fraction of 2**64, are below {fraction}"
