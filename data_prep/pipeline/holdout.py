"""Which documents are held out for validation: those whose hash falls below the fraction.

The hash is of the text alone, so a document stays on its side when the corpus is reordered or grows,
and copies of one text are on one side.
"""

from __future__ import annotations

import xxhash


def digest(text: bytes) -> bytes:
    """The 16 bytes by which a document, in UTF-8, is put on its side and told from others: XXH3-128."""
    return xxhash.xxh3_128_digest(text)


def below(text_digest: bytes, fraction: float) -> bool:
    return int.from_bytes(text_digest[:8], "big") < fraction * 2**64


def is_validation(text: str, fraction: float) -> bool:
    return below(digest(text.encode()), fraction)


def rule(fraction: float) -> str:
    """The rule in words, for the manifest."""
    return (
        f"val if the first 8 bytes of XXH3-128(text in UTF-8), as a big-endian fraction of 2**64, are below {fraction}"
    )
