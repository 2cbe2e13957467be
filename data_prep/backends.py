"""What encodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hpcgpt.tokenizer import Tokenizer


class Encoder(Protocol):
    name: str

    def batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]: ...


class Tiktoken:
    name = "tiktoken"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoding = tokenizer.encoding

    def batch(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        parts = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


def encoder(tokenizer: Tokenizer, backend: str) -> Encoder:
    del backend
    return Tiktoken(tokenizer)
