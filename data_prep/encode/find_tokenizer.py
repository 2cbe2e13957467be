"""Which program turns text into ids: the same ids from each, at different speeds.

================  ============================================================================================
``tiktoken``      runs every byte-level BPE; what the others are compared with
``gigatoken``     5 to 10 times faster (1.5 to 2 times on Chinese), optional, and only for patterns that it knows
``tokenizers``    runs the tokenizers that only it can run, see ``hpcgpt.tokenizer.huggingface``
================  ============================================================================================

"auto" takes gigatoken where it is installed, knows the pattern, and finds tiktoken's ids for the strings of
``data_prep.encode.equivalence_texts`` at every start. Chinese then goes through ``data_prep.encode.ideographs`` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import equivalence_texts, from_tiktoken, gigatoken_encoder, ideographs
from hpcgpt.errors import UserError
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.huggingface import LibraryTokenizer
from hpcgpt.tokenizer.interface import Tokenizer

Backend = Literal["auto", "tiktoken", "gigatoken", "tokenizers"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Batch = tuple[NDArray[np.uint32], NDArray[np.int64]]


class Encoder(Protocol):
    """`why` is a sentence for the user where "auto" could not take the fastest, else empty."""

    name: str
    why: str

    def batch(self, texts: Sequence[str]) -> Batch:
        """The ids of all texts one after the other (n,), and how many each has (k,). No lone surrogates in them."""
        ...


def encoder(tokenizer: Tokenizer, backend: Backend = "auto") -> Encoder:
    """The encoder of that name for `tokenizer`.

    Raises:
        UserError: `backend` is not "auto" and cannot do this tokenizer.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        if backend not in ("auto", "tokenizers"):
            raise UserError(
                f"backend {backend} cannot run tokenizer {tokenizer.name}: it is no byte-level BPE that tiktoken could "
                "run as well; leave the backend at auto, or choose tokenizers"
            )
        return OneByOne("tokenizers", tokenizer.encode)
    if not isinstance(tokenizer, ByteLevelBPE) or backend == "tokenizers":
        raise UserError(
            f"backend {backend} cannot run tokenizer {tokenizer.name}, which is tiktoken's: leave it at auto"
        )
    plain = OneByOne("tiktoken", lambda text: tokenizer.encoding.encode_to_numpy(text, disallowed_special=()))
    if backend == "tiktoken":
        return plain
    try:
        fast: Encoder = gigatoken_encoder.Gigatoken(tokenizer, plain.batch)
        check(fast, plain)
        if tokenizer.pattern == from_tiktoken.GPT2_PATTERN:
            fast = ideographs.ByCharacter(fast, tokenizer.ranks, equivalence_texts.chinese())
    except ValueError as error:
        if backend == "gigatoken":
            raise
        plain.why = f"encoding with tiktoken, not gigatoken: {error}"
        return plain
    return fast


def check(one: Encoder, other: Encoder) -> None:
    """Compare two encoders on some hundred strings.

    Raises:
        UserError: they differ; the message names the string.
    """
    texts = equivalence_texts.chosen()
    ids, counts = one.batch(texts)
    expected, expected_counts = other.batch(texts)
    if np.array_equal(counts, expected_counts) and np.array_equal(ids, expected):
        return
    places = np.stack([np.cumsum(counts), np.cumsum(expected_counts)])
    for number, (stop, expected_stop) in enumerate(places.T):
        if not np.array_equal(ids[:stop], expected[:expected_stop]):
            raise UserError(f"{one.name} and {other.name} give different ids for {texts[number][:40]!r}")


class OneByOne:
    """Text by text, all in one array at the end."""

    def __init__(self, name: str, encode: Callable[[str], Sequence[int] | NDArray[np.uint32]]) -> None:
        self.name, self.why = name, ""
        self._encode = encode

    def batch(self, texts: Sequence[str]) -> Batch:
        parts = [self._encode(text) for text in texts]
        counts = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.empty(int(counts.sum()), dtype=np.uint32)
        start = 0
        for part in parts:
            ids[start : start + len(part)] = part
            start += len(part)
        return ids, counts
