"""Choose which documents are held out for validation: those whose hash is below the fraction, or those of --val.

The hash is of the text alone. So a document stays in its split when the corpus is reordered or grows, and all copies of
a text are in the same split.
"""

from __future__ import annotations

import xxhash


def digest(text: bytes) -> bytes:
    """Return the hash of a document's UTF-8 text, 16 bytes of XXH3-128. It decides the split, and finds duplicates."""
    return xxhash.xxh3_128_digest(text)


def is_held_out(text_digest: bytes, fraction: float) -> bool:
    """Return whether the document with this hash is held out for validation."""
    return int.from_bytes(text_digest[:8], "big") < fraction * 2**64


def is_validation(text: str, fraction: float) -> bool:
    """Return whether a document is held out for validation."""
    return is_held_out(digest(text.encode()), fraction)


OWN_FILES_RULE = "val if in a file of --val"  # covered by the manifest's digest


def rule(fraction: float) -> str:
    """Describe the rule for the manifest, whose digest covers these words."""
    return (
        f"val if the first 8 bytes of XXH3-128(text in UTF-8), as a big-endian fraction of 2**64, are below {fraction}"
    )
