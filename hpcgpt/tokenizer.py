"""The tokenizer that lies beside the shards, so that nothing else is needed to read them.

A tokenizer is a folder::

    tokenizer/
      vocab.tiktoken    tiktoken's own format: a line an id, the token's bytes in base64 and its rank
      tokenizer.json    name, pattern (how text is cut before merging), special_tokens, end_of_text, fingerprint

Its fingerprint is the SHA-256 over vocabulary, pattern and special tokens: two tokenizers with the same
fingerprint give the same ids, and one that was damaged no longer fits its own. Text is always encoded as
plain text: a literal ``<|endoftext|>`` in a corpus becomes the tokens of those 13 characters, never the id.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from hpcgpt import durable

SPECIAL_TOKEN_POLICY = "in the text they are plain text"


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE: `ranks` maps a token's bytes to its id; `special_tokens` come on top."""

    name: str
    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    end_of_text: int

    @property
    def vocab_size(self) -> int:
        return max([*self.ranks.values(), *self.special_tokens.values()]) + 1

    @cached_property
    def fingerprint(self) -> str:
        parts = [self.pattern, sorted(self.special_tokens.items()), self.end_of_text]
        sha = hashlib.sha256(json.dumps(parts).encode())
        sha.update(_vocabulary(self.ranks))
        return sha.hexdigest()

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for (vocab_size,); special tokens stand for none."""
        table = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.ranks.items():
            table[rank] = len(token)
        return table

    def encode(self, text: str) -> list[int]:
        """The ids of plain text."""
        return self.encoding.encode_ordinary(text)

    def document(self, text: str) -> NDArray[np.uint16]:
        """The ids of one document, end-of-text first (n,). `text` must be free of lone surrogates."""
        ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        return np.concatenate([[self.end_of_text], ids]).astype(np.uint16)

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "special_tokens": SPECIAL_TOKEN_POLICY,
        }


def stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` piece by piece, never half a character. Special tokens print as they are named."""
    special = {number: name for name, number in tokenizer.special_tokens.items()}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number in ids:
        if number in special:
            yield decoder.decode(b"", final=True) + special[number]
            decoder.reset()
        else:
            yield decoder.decode(tokenizer.encoding.decode_single_token_bytes(number))
    yield decoder.decode(b"", final=True)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the two files into `folder`, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    durable.write(folder / "vocab.tiktoken", _vocabulary(tokenizer.ranks))
    about = {
        "name": tokenizer.name,
        "pattern": tokenizer.pattern,
        "special_tokens": tokenizer.special_tokens,
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
    }
    durable.write(folder / "tokenizer.json", (json.dumps(about, indent=1) + "\n").encode())


def load(folder: Path, fingerprint: str = "") -> Tokenizer:
    """The tokenizer in `folder`.

    Raises:
        ValueError: it is missing, damaged, or not the one that `fingerprint` names.
    """
    try:
        about = json.loads((folder / "tokenizer.json").read_bytes())
        lines = (folder / "vocab.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        found = Tokenizer(about["name"], about["pattern"], ranks, about["special_tokens"], about["end_of_text"])
        if found.fingerprint != about["fingerprint"]:
            raise ValueError("its content does not fit its fingerprint")
    except OSError as error:
        raise ValueError(f"no tokenizer in {folder}: {error.strerror} ({error.filename})") from None
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"{folder}: the tokenizer is damaged: {error!r}") from None
    if fingerprint and found.fingerprint != fingerprint:
        raise ValueError(
            f"{folder}: tokenizer {found.name} has fingerprint {found.fingerprint[:12]}, but the shards "
            f"were made with {fingerprint[:12]}"
        )
    return found


def _vocabulary(ranks: dict[bytes, int]) -> bytes:
    rows = sorted(ranks.items(), key=lambda row: row[1])
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in rows)
