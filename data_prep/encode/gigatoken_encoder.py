"""Encode with gigatoken (MIT), the fast encoder, so that the ids are those of tiktoken.

- It is built from the ranks without special tokens, so that a literal ``<|endoftext|>`` stays text.
- How text is split is built into gigatoken, so only patterns are accepted that were compared with it (`SCHEMES`).
- It uses Unicode 17, tiktoken Unicode 16. A text with a newer letter is encoded by tiktoken.
- It caches every word, at up to 12 bytes per byte of text, and never removes one. So it is built again when this
  process has grown by `MOST_GROWTH_BYTES`. That costs 0.1 s of CPU time, as much as encoding 10 MB of English.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import flat_rows
from data_prep.encode.interface import EncodedBatch
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import split_patterns
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, write_ranks

MOST_GROWTH_BYTES = 256_000_000
# It is built again only after this much text: the growth may have other causes, or be unknown.
FEWEST_CHARACTERS = 16_000_000

# Pattern -> its name in gigatoken. A test of encoders compares each pair on every code point, with a vocabulary that
# shows where text was split.
SCHEMES = {
    split_patterns.GPT2_PATTERN: "gpt2",
    split_patterns.GPT2_ORIGINAL_PATTERN: "gpt2",
    split_patterns.GPT4_PATTERN: "gpt4",
    split_patterns.O200K_PATTERN: "o200k",
    split_patterns.LLAMA3_PATTERN: "olmo3",
    split_patterns.QWEN2_PATTERN: "qwen2",
}
# Ranges of letters, marks and digits that are new in Unicode 17, and U+0295, which is no longer lower case (only o200k
# depends on that). Found by comparing every code point between others, as benchmarks/fuzz_backends.py does.
NEWER = [
    (0x295, 0x295),
    (0x88F, 0x88F), (0xC5C, 0xC5C), (0xCDC, 0xCDC), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0xA7CE, 0xA7CF),
    (0xA7D2, 0xA7D2), (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7), (0x10EFA, 0x10EFB),
    (0x11B60, 0x11B67), (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2), (0x1E6C0, 0x1E6DE),
    (0x1E6E0, 0x1E6F5), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD), (0x323B0, 0x33479),
]  # fmt: skip
# The tokens of GPT-2's tokenizer in which one may begin, found by `find_starts`, which takes 30 ms with its ranks.
GPT2 = "b7f16c7f20f21e0cbd753b39c66443240f6b4c3b8608b2817e30dd752f93ebbd"  # the fingerprint
GPT2_STARTS = [134, 156, 157, 166, 172, 28053]
_NEWER_LETTER = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in NEWER) + "]")


def has_newer_letter(text: str) -> bool:
    """Return whether a text has a letter that gigatoken and tiktoken may classify differently."""
    return _NEWER_LETTER.search(text) is not None


class GigatokenEncoder:
    """Encodes with gigatoken; `plain` encodes texts with newer letters.

    Raises:
        UserError: gigatoken is not installed, or cannot run this tokenizer.
    """

    name, fallback_reason = "gigatoken", ""

    def __init__(self, tokenizer: ByteLevelBPE, plain: Callable[[Sequence[str]], EncodedBatch]) -> None:
        scheme = SCHEMES.get(tokenizer.pattern)
        if scheme is None:
            raise UserError(f"gigatoken does not support the pattern of tokenizer {tokenizer.name}")
        try:
            from gigatoken.gigatoken_rs import BPETokenizer
        except ImportError as error:
            raise UserError(
                f"it is not installed ({error}); `pip install 'hpcgpt[fast]'` makes this several times faster"
            ) from None
        self._tokenizer, self._scheme, self._plain = tokenizer, scheme, plain
        self._from_tiktoken_ranks: Callable[[str, str], Any] = BPETokenizer.from_tiktoken
        # gigatoken needs ranks without gaps, but the ids of special tokens may be the first ones, or in between.
        self._numbers: NDArray[np.uint32] | None = None
        self._content = tokenizer.rank_file
        if tokenizer.highest_rank != self._content.count(b"\n") - 1:
            self._numbers = np.sort(np.fromiter(tokenizer.ranks.values(), np.uint32, len(tokenizer.ranks)))
            order = sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
            self._content = write_ranks({token: number for number, token in enumerate(order)})
        self._gigatoken = self._build()
        self._characters = 0
        self._limit = _resident_bytes() + MOST_GROWTH_BYTES

    def batch(self, texts: Sequence[str]) -> EncodedBatch:
        if self._characters >= FEWEST_CHARACTERS and not 0 < _resident_bytes() < self._limit:
            self._gigatoken = None  # so that there are never two in memory
            self._gigatoken, self._characters = self._build(), 0
        with flat_rows.in_place_of_awkward():
            try:
                encoded = self._gigatoken.encode_batch(list(texts), parallel=False)
            except AttributeError as error:  # a newer gigatoken that needs more of awkward
                raise UserError(f"gigatoken's result has an unknown layout: {error}") from None
        ids, counts = _as_arrays(encoded)
        if self._numbers is not None:
            ids = self._numbers[ids]
        self._characters += sum(map(len, texts))
        newer = self._newer(texts, ids, counts)
        return self._with_tiktokens(newer, texts, ids, counts) if newer else (ids, counts)

    def _newer(self, texts: Sequence[str], ids: NDArray[np.uint32], counts: NDArray[np.int64]) -> list[int]:
        """Return the numbers of the texts with newer letters."""
        suspects = [number for number, text in enumerate(texts) if not text.isascii()]
        ends = np.cumsum(counts)
        # `take` needs half the time of an index.
        if len(suspects) < len(texts) / 8:  # as in English, where they have a tenth of the tokens
            spans = [(number, ends[number] - counts[number], ends[number]) for number in suspects]
            suspects = [number for number, start, end in spans if self._may_be_newer.take(ids[start:end]).any()]
        else:
            found = np.flatnonzero(self._may_be_newer.take(ids))
            in_order = np.searchsorted(ends, found, side="right")
            # Not np.unique, whose first call imports numpy.ma, for 8 ms.
            suspects = in_order[np.diff(in_order, prepend=-1) > 0].tolist()
        return [number for number in suspects if has_newer_letter(texts[number])]

    def _build(self) -> Any:
        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self._content)
            file.flush()
            try:
                return self._from_tiktoken_ranks(file.name, self._scheme)
            except (KeyboardInterrupt, SystemExit, MemoryError):
                raise
            except BaseException as error:  # a panic in Rust is not an Exception
                problem = str(error).partition("\n")[0]
                raise UserError(f"gigatoken cannot run tokenizer {self._tokenizer.name}: {problem}") from None

    @cached_property
    def _may_be_newer(self) -> NDArray[np.bool_]:
        """For each token, whether a newer letter may begin in it (vocab_size,). Ten times faster than a text search."""
        table = np.zeros(self._tokenizer.vocab_size, dtype=np.bool_)
        table[GPT2_STARTS if self._tokenizer.fingerprint == GPT2 else find_starts(self._tokenizer.ranks)] = True
        return table

    def _with_tiktokens(
        self, numbers: Sequence[int], texts: Sequence[str], ids: NDArray[np.uint32], counts: NDArray[np.int64]
    ) -> EncodedBatch:
        """Replace the ids of the texts with these numbers by those of tiktoken."""
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for number in numbers:
            parts[number], _ = self._plain([texts[number]])
        return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


def find_starts(ranks: dict[bytes, int]) -> list[int]:
    """Return the ids of the tokens in which a newer letter may begin."""
    letters = [chr(code).encode() for first, last in NEWER for code in range(first, last + 1)]
    starts = {letter[:length] for letter in letters for length in range(1, 5)}
    lead = re.compile(b"[" + b"".join({letter[:1] for letter in letters}) + b"]")
    # One search in all tokens at once takes a tenth of the time of a search in each.
    joined = b"".join(ranks)
    ends = np.cumsum(np.fromiter(map(len, ranks), np.int64, len(ranks)))
    found = [match.start() for match in lead.finditer(joined)]
    tokens = np.searchsorted(ends, found, side="right")
    numbers = np.fromiter(ranks.values(), np.int64, len(ranks))
    return sorted(
        {
            number
            for at, number, end in zip(found, numbers[tokens].tolist(), ends[tokens].tolist(), strict=True)
            if joined[at : min(end, at + _length(joined[at]))] in starts
        }
    )


def _length(lead: int) -> int:
    """Return how many bytes a UTF-8 character has, given its first."""
    return 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2


def _as_arrays(encoded: object) -> EncodedBatch:
    """Return the result of encode_batch, which `flat_rows.unflatten` made, as arrays.

    Raises:
        UserError: it has another layout than expected.
    """
    match encoded:
        case (np.ndarray() as ids, np.ndarray() as counts):
            if ids.dtype == np.uint32 and counts.dtype == np.int64 and ids.ndim == counts.ndim == 1:
                return ids, counts
            raise UserError(f"gigatoken's ids are {ids.dtype} and their counts {counts.dtype}: expected uint32, int64")
    raise UserError(f"gigatoken's result has an unknown layout: {type(encoded).__name__}")


def _resident_bytes() -> int:
    """Return the resident memory of this process in bytes; 0 if it is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
