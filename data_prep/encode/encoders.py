"""Choose the library that encodes text. All give the same ids, at different speeds.

================  ============================================================================================
``tiktoken``      for every byte-level BPE; the reference for gigatoken
``gigatoken``     5 to 10 times faster (1.5 to 2 times on Chinese); optional, and only for some patterns
``tokenizers``    for the tokenizers that need it, see ``hpcgpt.tokenizer.huggingface``
================  ============================================================================================

"auto" means gigatoken if it is installed, supports the pattern, and gives the same ids as tiktoken for the strings of
``hpcgpt.tokenizer.equivalence_texts``, which is checked at every start. For GPT-2's tokenizer the digest of tiktoken's
ids is here, so that tiktoken need not be built. Chinese text is then encoded by ``data_prep.encode.ideographs``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import gigatoken_encoder, ideographs
from data_prep.encode.interface import EncodedBatch, Encoder
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import equivalence_texts, from_tiktoken
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.huggingface import LibraryTokenizer
from hpcgpt.tokenizer.interface import Tokenizer

Backend = Literal["auto", "tiktoken", "gigatoken", "tokenizers"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
# `digest` of tiktoken, by the tokenizer's fingerprint. Without it tiktoken is built to compare, which takes 30 ms.
TIKTOKENS = {gigatoken_encoder.GPT2: "5c39104525f91b903d7aa1c450c636e2b4cb1a354dfdfc51c1f07850aa96ec37"}


def choose(tokenizer: Tokenizer, backend: Backend = "auto") -> Encoder:
    """Make the encoder for `tokenizer`.

    Raises:
        UserError: `backend` is not "auto", and cannot run this tokenizer.
    """
    if isinstance(tokenizer, LibraryTokenizer):
        if backend not in ("auto", "tokenizers"):
            raise UserError(
                f"backend {backend} cannot run tokenizer {tokenizer.name}, which needs the library tokenizers: leave "
                "the backend at auto, or choose tokenizers"
            )
        return OneByOneEncoder("tokenizers", tokenizer.encode)
    if not isinstance(tokenizer, ByteLevelBPE) or backend == "tokenizers":
        raise UserError(
            f"backend {backend} cannot run tokenizer {tokenizer.name}, which tiktoken runs: leave the backend at auto"
        )
    plain = OneByOneEncoder("tiktoken", tokenizer.encode_to_numpy)
    if backend == "tiktoken":
        return plain
    try:
        fast: Encoder = gigatoken_encoder.GigatokenEncoder(tokenizer, plain.batch)
        if digest(fast) != TIKTOKENS.get(tokenizer.fingerprint):
            check(fast, plain)
        if tokenizer.pattern == from_tiktoken.GPT2_PATTERN:
            fast = ideographs.ByCharacterEncoder(fast, lambda: tokenizer.ranks, equivalence_texts.chinese())
    except ValueError as error:
        if backend == "gigatoken":
            raise
        plain.fallback_reason = f"encoding with tiktoken, not gigatoken: {error}"
        return plain
    return fast


def digest(encoder: Encoder) -> str:
    """Hash the ids of a few hundred strings, all those of `check` that gigatoken may encode."""
    texts = equivalence_texts.chosen()
    ids, counts = encoder.batch([text for text in texts if not gigatoken_encoder.has_newer_letter(text)])
    return hashlib.sha256(ids.tobytes() + counts.tobytes()).hexdigest()


def check(one: Encoder, other: Encoder) -> None:
    """Compare two encoders on a few hundred strings.

    Raises:
        UserError: they differ; the message names the first string.
    """
    texts = equivalence_texts.chosen()
    ids, counts = one.batch(texts)
    expected, expected_counts = other.batch(texts)
    if np.array_equal(counts, expected_counts) and np.array_equal(ids, expected):
        return
    stops = np.stack([np.cumsum(counts), np.cumsum(expected_counts)])
    for number, (stop, expected_stop) in enumerate(stops.T):
        if not np.array_equal(ids[:stop], expected[:expected_stop]):
            raise UserError(f"{one.name} and {other.name} give different ids for {texts[number][:40]!r}")


class OneByOneEncoder:
    """Encodes one text after the other."""

    def __init__(self, name: str, encode: Callable[[str], Sequence[int] | NDArray[np.uint32]]) -> None:
        self.name, self.fallback_reason = name, ""
        self._encode = encode

    def batch(self, texts: Sequence[str]) -> EncodedBatch:
        parts = [self._encode(text) for text in texts]
        counts = np.fromiter(map(len, parts), np.int64, len(parts))
        ids = np.empty(int(counts.sum()), dtype=np.uint32)
        start = 0
        for part in parts:
            ids[start : start + len(part)] = part
            start += len(part)
        return ids, counts
