"""Byte-level BPE, run by tiktoken: GPT-2's tokenizer and similar ones, and those trained by data_prep.

``vocab.tiktoken`` is tiktoken's own format: a line for each id, with the token's bytes in base64 and its rank. The id
is the rank: of two possible merges, the one with the lower id is made first. The lines are in the order of the ranks.
The pattern splits text before merging.
The fingerprint is the SHA-256 of pattern, special tokens and vocabulary.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import tiktoken
from numpy.typing import NDArray

from hpcgpt.errors import UserError
from hpcgpt.tokenizer import split_patterns
from hpcgpt.tokenizer.interface import CharacterDecoder, Tokenizer


class UnencodableError(UserError):
    """A text that tiktoken cannot split into words; `problem` is the message without the remedy."""

    @property
    def problem(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.problem}: shorten its runs of white space, or leave it out"


@dataclass(frozen=True)
class ByteLevelBPE(Tokenizer):
    """`rank_file` is the content of vocab.tiktoken; `special_tokens` are not in it."""

    kind: ClassVar[str] = "tiktoken"

    name: str
    pattern: str
    rank_file: bytes
    special_tokens: dict[str, int]
    end_of_text: int

    @classmethod
    def from_ranks(
        cls, name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int], end_of_text: int
    ) -> ByteLevelBPE:
        """Make one from a map of each token's bytes to its id."""
        made = cls(name, pattern, write_ranks(ranks), special_tokens, end_of_text)
        made.__dict__["ranks"] = ranks  # so that they are not parsed again
        return made

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """Map each token's bytes to its id. Not before they are asked for: that takes 15 ms for GPT-2's."""
        return _read_ranks(self.rank_file)

    @property
    def highest_rank(self) -> int:
        return int(self.rank_file.rsplit(None, 1)[1])

    @cached_property
    def vocab_size(self) -> int:
        return max([self.highest_rank, *self.special_tokens.values()]) + 1

    @cached_property
    def fingerprint(self) -> str:
        parts = [self.pattern, sorted(self.special_tokens.items()), self.end_of_text]
        sha = hashlib.sha256(json.dumps(parts).encode())
        sha.update(self.rank_file)
        return sha.hexdigest()

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        return _Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special_tokens
        )

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        table = np.zeros(self.vocab_size, dtype=np.int64)
        for token, rank in self.ranks.items():
            table[rank] = len(token)
        return table

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_to_numpy(text).tolist()
        return ids

    def encode_to_numpy(self, text: str) -> NDArray[np.uint32]:
        """Encode plain text (n,).

        Raises:
            UnencodableError: it has a run of white space that tiktoken cannot split with this pattern.
        """
        try:
            return self._encode_words(text)
        except UnicodeEncodeError:  # lone surrogates
            return self.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:
            # Without a run to cut out, the whole is encoded again, with the same error.
            parts = split_patterns.split_long_runs(text, self.pattern) or [text]
        encode_word = self.encoding._encode_single_piece
        try:
            return np.concatenate([
                np.array(encode_word(part), np.uint32) if number % 2 else self._encode_words(part)
                for number, part in enumerate(parts)
            ])  # fmt: skip
        except ValueError as error:
            raise UnencodableError(
                f"a document of {len(text):,} characters, which begins {text[:60]!r}, cannot be split by the pattern "
                f"of tokenizer {self.name} ({error})"
            ) from None

    def _encode_words(self, text: str) -> NDArray[np.uint32]:
        # Not encode_ordinary, which panics where this one raises a ValueError.
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def stream(
        self,
        ids: Iterable[int],
        after: Sequence[int] = (),  # noqa: ARG002
        unfinished: str = "",
    ) -> Iterator[str]:
        special = {number: name for name, number in self.special_tokens.items()}
        decoder = CharacterDecoder(unfinished)
        for number in ids:
            if number in special:
                yield decoder.end() + special[number]
            else:
                yield decoder.decode(self.encoding.decode_single_token_bytes(number))
        yield decoder.end()

    def files(self) -> dict[str, bytes]:
        return {"vocab.tiktoken": self.rank_file}

    def about(self) -> dict[str, Any]:
        return {"pattern": self.pattern}


class _Encoding(tiktoken.Encoding):
    """tiktoken's, for which an id without a token has no text. A model may have more ids than its tokenizer."""

    def decode_single_token_bytes(self, token: int) -> bytes:
        try:
            return super().decode_single_token_bytes(token)
        except KeyError:
            return b""


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Parse the content of a .tiktoken file.

    Raises:
        UserError: it is not such a file.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"line {number} is not a token in base64 and its rank") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{len(missing)} of the 256 bytes have no id, among them 0x{missing[0]:02x}")
    return ranks


def _read_ranks(content: bytes) -> dict[bytes, int]:
    """Parse what `write_ranks` wrote; without a look at each line, which would take twice as long."""
    words = content.split()
    return dict(zip(map(binascii.a2b_base64, words[0::2]), map(int, words[1::2]), strict=True))


def write_ranks(ranks: dict[bytes, int]) -> bytes:
    """Return the content of a .tiktoken file."""
    order = sorted(ranks, key=ranks.__getitem__)
    return b"".join(b"%b %d\n" % (binascii.b2a_base64(token, newline=False), ranks[token]) for token in order)


def byte_characters() -> dict[int, str]:
    """Return the printable character for each byte in GPT-2's and Hugging Face's token files, in the order of GPT-2's
    first 256 ids: the byte itself if it is printable, else the next unused one from U+0100."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
