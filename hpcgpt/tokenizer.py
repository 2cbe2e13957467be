"""The tokenizer that lies beside the shards, so that nothing else is needed to read them.

A tokenizer is a folder::

    tokenizer/
      tokenizer.json      kind, name, end_of_text, special_tokens, fingerprint, and for tiktoken the pattern
      vocab.tiktoken      of the kind "tiktoken": see hpcgpt.tokenizer_tiktoken, which most tokenizers are
      huggingface.json    of the kind "tokenizers": see hpcgpt.tokenizer_library, for all the others

Two tokenizers with the same fingerprint give the same ids, and one that was damaged no longer fits its own.
Text is always encoded as plain text: a literal ``<|endoftext|>`` in a corpus becomes the tokens of those 13
characters, never the id.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hpcgpt import durable
from hpcgpt.errors import InputError, cannot_read

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


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files into `folder`, which is made if need be; tokenizer.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        durable.keep(folder / name, content)
    about = {
        "kind": tokenizer.kind,
        "name": tokenizer.name,
        **tokenizer.about(),
        "special_tokens": tokenizer.special_tokens,
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
    }
    durable.keep(folder / "tokenizer.json", (json.dumps(about, indent=1) + "\n").encode())


def load(folder: Path, fingerprint: str = "") -> Tokenizer:
    """The tokenizer in `folder`, of either kind.

    Raises:
        UserError: it is missing, damaged, or not the one that `fingerprint` names.
    """
    try:
        found = _read(folder)
    except OSError as error:
        raise cannot_read(error, f"no tokenizer in {folder}: {error.strerror} ({error.filename})") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: the tokenizer is damaged: {error!r}") from None
    if fingerprint and found.fingerprint != fingerprint:
        raise InputError(
            f"{folder}: tokenizer {found.name} has fingerprint {found.fingerprint[:12]}, but the shards "
            f"were made with {fingerprint[:12]}"
        )
    return found


def _read(folder: Path) -> Tokenizer:
    # Late: the two kinds know this module, and `tokenizers` need not be loaded where it is not needed.
    from hpcgpt import tokenizer_library, tokenizer_tiktoken

    about = json.loads((folder / "tokenizer.json").read_bytes())
    found: Tokenizer
    if about["kind"] == tokenizer_tiktoken.ByteLevelBPE.kind:
        ranks = tokenizer_tiktoken.parse_ranks((folder / "vocab.tiktoken").read_bytes())
        found = tokenizer_tiktoken.ByteLevelBPE(
            about["name"], about["pattern"], ranks, about["special_tokens"], about["end_of_text"]
        )
    elif about["kind"] == tokenizer_library.LibraryTokenizer.kind:
        content = (folder / "huggingface.json").read_text(encoding="utf-8")
        found = tokenizer_library.LibraryTokenizer(
            about["name"], content, about["special_tokens"], about["end_of_text"]
        )
    else:
        raise InputError(f"its kind is {about['kind']}")
    if found.fingerprint != about["fingerprint"]:
        raise InputError("its content does not fit its fingerprint")
    return found
