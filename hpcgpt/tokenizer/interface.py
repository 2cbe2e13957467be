"""What every kind of tokenizer can do: text to ids, ids to text, and what identifies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKEN_POLICY = "in the text they are plain text"


class Tokenizer(ABC):
    """What both kinds can do. `special_tokens` are those that text never becomes, end-of-text among them."""

    kind: ClassVar[str]
    name: str
    special_tokens: dict[str, int]
    end_of_text: int

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the highest id."""

    @property
    def unknown(self) -> int | None:
        """The id that stands for text that the vocabulary cannot spell; None if it can spell any text."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that an id depends on."""

    @property
    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for (vocab_size,); special tokens stand for none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of plain text. Lone surrogates become U+FFFD."""

    @abstractmethod
    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """See the function of this name."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """What lies beside tokenizer.json, by name."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What tokenizer.json says besides kind, name, end_of_text, special_tokens and fingerprint."""

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "special_tokens": SPECIAL_TOKEN_POLICY,
        }


def stream(tokenizer: Tokenizer, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
    """The text of `ids` piece by piece, never half a character. Special tokens print as they are named.

    `after` are the ids before them: some tokenizers drop the blank of a text's first word, and only that.
    """
    return tokenizer.stream(ids, after)
