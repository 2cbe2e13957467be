"""A tokenizer that only Hugging Face's `tokenizers` can run: Unigram, WordPiece, Metaspace, normalizers.

``huggingface.json`` is the ``tokenizer.json`` that it came from, made safe for a corpus (`prepared`):
nothing cuts or pads documents, nothing adds tokens, nothing draws lots, and special tokens in the text are
plain text. The fingerprint is the SHA-256 over that file, the special tokens and end-of-text.

The library reads data, it runs no code from the file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import tokenizers
from numpy.typing import NDArray

from hpcgpt.errors import UserError
from hpcgpt.tokenizer.interface import Tokenizer

# Around the name of a special token that stands in the model's own vocabulary: noncharacters, which no text
# is meant to hold, so that the model cannot make the token of text either.
_HIDDEN = "\ufdd0{}\ufdd1"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}
# So many tokens are decoded again with each new one; the rest cannot change any more.
_CONTEXT = 4
_LONGEST_WAIT = 64


@dataclass(frozen=True)
class LibraryTokenizer(Tokenizer):
    """`content` is JSON, as `prepared` makes it."""

    kind: ClassVar[str] = "tokenizers"

    name: str
    content: str
    special_tokens: dict[str, int]
    end_of_text: int

    @cached_property
    def vocab_size(self) -> int:
        return max([*self.library.get_vocab(with_added_tokens=True).values(), *self.special_tokens.values()]) + 1

    @cached_property
    def unknown(self) -> int | None:
        model = json.loads(self.content)["model"]
        if isinstance(model["vocab"], dict):
            found = model["vocab"].get(model.get("unk_token"))
            return None if found is None else int(found)
        return None if model.get("unk_id") is None else int(model["unk_id"])

    @cached_property
    def fingerprint(self) -> str:
        parts = [sorted(self.special_tokens.items()), self.end_of_text, self.content]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def library(self) -> tokenizers.Tokenizer:
        return open_library(self.content)

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """As in the base class, but where the tokenizer changes the text (its case, its blanks) they are the bytes
        of what it made of it, and a blank that it puts before a text counts too."""
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        about = json.dumps(json.loads(self.content)["decoder"])
        table = np.zeros(self.vocab_size, dtype=np.int64)
        # Behind another token, since a decoder may drop the blank of the first.
        before = self.library.encode("a", add_special_tokens=False).ids[-1:]
        start = self._bytes(before)
        for token, number in vocabulary.items():
            if '"ByteFallback"' in about and _BYTE.fullmatch(token):
                table[number] = 1
            elif '"ByteLevel"' in about:
                table[number] = len(token)  # a character stands for a byte
            else:
                table[number] = self._bytes([*before, number]) - start
        table[list(self.special_tokens.values())] = 0
        return table

    def encode(self, text: str) -> list[int]:
        try:
            return self.library.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # lone surrogates
            clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self.library.encode(clean, add_special_tokens=False).ids

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        special = {number: name for name, number in self.special_tokens.items()}
        # What a token stands for depends on the tokens before it, so a few of them are decoded along.
        context = list(after[-_CONTEXT:])
        while any(number in special for number in context):
            context.pop(0)
        new: list[int] = []
        for number in ids:
            if number in special:
                yield self._behind(context, new) + special[number]
                context, new = [], []
                continue
            new.append(number)
            text = self._behind(context, new)
            if not text.endswith("\ufffd") or len(new) > _LONGEST_WAIT:
                yield text
                context, new = [*context, *new][-_CONTEXT:], []
        yield self._behind(context, new)

    def files(self) -> dict[str, bytes]:
        return {"huggingface.json": self.content.encode()}

    def about(self) -> dict[str, Any]:
        return {}

    def _behind(self, context: list[int], new: list[int]) -> str:
        before = self.library.decode(context, skip_special_tokens=False)
        return self.library.decode([*context, *new], skip_special_tokens=False)[len(before) :]

    def _bytes(self, ids: list[int]) -> int:
        return len(self.library.decode(ids, skip_special_tokens=False).encode())


def open_library(content: str) -> tokenizers.Tokenizer:
    """The library's own object for a tokenizer.json, with special tokens in the text as plain text.

    Raises:
        UserError: the library cannot make sense of it.
    """
    try:
        library = tokenizers.Tokenizer.from_str(content)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception itself, and panics are no Exception at all
        raise UserError(f"`tokenizers` cannot read it: {error}") from None
    library.encode_special_tokens = True
    return library


def prepared(source: dict[str, Any], special: Iterable[str]) -> str:
    """The content of huggingface.json, made of a parsed tokenizer.json and the names of its special tokens."""
    names = set(special)
    model = dict(source["model"])
    if "dropout" in model:
        model["dropout"] = None
    # A byte-level BPE that obeys its merges makes of text only what a merge makes.
    hidden = {name: _HIDDEN.format(name) for name in names} if _makes_any_entry(model) else {}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    pieces = byte_pieces(source["model"])
    added = [
        {**token, "content": hidden.get(token["content"], token["content"]), "special": token["content"] in names}
        for token in source.get("added_tokens") or []
        if token["content"] not in pieces
    ]
    body = {
        "version": source.get("version", "1.0"),
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": source.get("normalizer"),
        "pre_tokenizer": source.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": source.get("decoder"),
        "model": model,
    }
    return json.dumps(body, ensure_ascii=False)


def byte_pieces(model: dict[str, Any]) -> set[str]:
    """The entries of a model's vocabulary that stand for bytes of what it has no other entry for, ``<0x0A>`` and so
    on. However an added token is marked, these have to stay usable for text, or it becomes the unknown token."""
    if not model.get("byte_fallback"):
        return set()
    return {token if isinstance(token, str) else token[0] for token in model["vocab"]} & _BYTE_PIECES


def _makes_any_entry(model: dict[str, Any]) -> bool:
    """Can text become any entry of this model's vocabulary, merged or not?"""
    return model.get("type") != "BPE" or bool(model.get("ignore_merges"))
