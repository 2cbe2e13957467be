"""The interface of tokenizers: text to ids, ids to text, and a fingerprint."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

SPECIAL_TOKEN_POLICY = "in the text they are plain text"


class Tokenizer(ABC):
    """A tokenizer. Text is never encoded to one of its `special_tokens`, which include end-of-text."""

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
        """The id of text that the vocabulary cannot represent; None if it can represent any text."""
        return None

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that ids depend on."""

    @property
    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """The bytes of text of each id (vocab_size,); 0 for special tokens."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Encode plain text. Lone surrogates become U+FFFD."""

    @abstractmethod
    def stream(self, ids: Iterable[int], after: Sequence[int] = (), unfinished: str = "") -> Iterator[str]:
        """See the function `stream` below."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the contents of the files beside tokenizer.json, by name."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Return the fields of tokenizer.json besides kind, name, end_of_text, special_tokens and fingerprint."""

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's entry in a manifest."""
        return {
            # Of a folder whose name is no UTF-8, which the manifest could not be written with.
            "name": self.name.encode(errors="backslashreplace").decode(),
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "special_tokens": SPECIAL_TOKEN_POLICY,
        }


class CharacterDecoder:
    """Decodes UTF-8 that arrives in pieces. A character is held back until its last byte; invalid bytes are U+FFFD."""

    def __init__(self, unfinished: str = "") -> None:
        """Replace a character without its last byte, at the end, by `unfinished`."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._unfinished = unfinished

    def decode(self, piece: bytes) -> str:
        """Return the characters that `piece` completes."""
        return self._decoder.decode(piece)

    def broken_off(self) -> str:
        """Return U+FFFD if bytes are held back, since what follows does not complete them; and begin anew."""
        return self._decoder.decode(b"", final=True)

    def end(self) -> str:
        """Return what stands for bytes that are still held back, and begin anew."""
        held_back, _ = self._decoder.getstate()
        self._decoder.reset()
        return self._unfinished if held_back else ""


def stream(tokenizer: Tokenizer, ids: Iterable[int], after: Sequence[int] = (), unfinished: str = "") -> Iterator[str]:
    """Decode `ids` one by one, without splitting characters. Special tokens are decoded to their names.

    A character is held back until it is complete. If the ids, or those before a special token, end within one, it is
    replaced by `unfinished`. Bytes that are no character become U+FFFD. `after` are the ids before them: some
    tokenizers drop the space before a text's first word.
    """
    return tokenizer.stream(ids, after, unfinished)
