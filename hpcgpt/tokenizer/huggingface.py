"""Tokenizers that only Hugging Face's `tokenizers` can run: Unigram, WordPiece, Metaspace, normalizers.

``huggingface.json`` is the original ``tokenizer.json``, changed so that it encodes a corpus exactly (`prepared`):
without truncation, padding, added tokens and dropout, and with special tokens in the text as plain text. The
fingerprint is the SHA-256 of that file, the special tokens and end-of-text.

The library reads the file as data; it runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hpcgpt.errors import UserError
from hpcgpt.tokenizer.byte_level_bpe import byte_characters
from hpcgpt.tokenizer.interface import CharacterDecoder, Tokenizer

if TYPE_CHECKING:
    import tokenizers

# Special tokens in the model's own vocabulary are renamed with noncharacters, which text does not contain, so that the
# model cannot encode text to them.
_HIDDEN = "\ufdd0{}\ufdd1"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTE_FALLBACK_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}
# This many tokens are decoded again with each new one; the text of earlier ones cannot change any more.
_CONTEXT = 4


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
        """As in the base class. If the tokenizer changes the text (case, spaces), the changed text's bytes are counted,
        and a space that it adds at the start of a text counts too."""
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        about = json.dumps(json.loads(self.content)["decoder"])
        table = np.zeros(self.vocab_size, dtype=np.int64)
        # Decoded after another token, since a decoder may drop the space of the first one.
        before = self.library.encode("a", add_special_tokens=False).ids[-1:]
        start = self._bytes(before)
        for token, number in vocabulary.items():
            if '"ByteFallback"' in about and _BYTE.fullmatch(token):
                table[number] = 1
            elif '"ByteLevel"' in about:
                table[number] = len(token)  # one character for each byte
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

    def stream(self, ids: Iterable[int], after: Sequence[int] = (), unfinished: str = "") -> Iterator[str]:
        special = {number: name for name, number in self.special_tokens.items()}
        # The text of a token depends on the tokens before it, so some of them are decoded with it.
        context = list(after[-_CONTEXT:])
        while any(number in special for number in context):
            context.pop(0)
        decoder = CharacterDecoder(unfinished)
        for number in ids:
            if number in special:
                yield decoder.end() + special[number]
                context = []
                continue
            if number in self._raw_bytes:
                yield decoder.decode(self._raw_bytes[number])
            else:
                # A character cannot be continued by a token of whole ones: what is held back of it is no character.
                yield decoder.broken_off() + self._decode_after(context, number)
            context = [*context, number][-_CONTEXT:]
        yield decoder.end()

    @cached_property
    def _raw_bytes(self) -> dict[int, bytes]:
        """The bytes of the tokens that may be a part of a character: of a byte-level tokenizer those of all tokens, of
        one that falls back to bytes those of ``<0x0A>`` and so on; of any other there are none."""
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        about = json.dumps(json.loads(self.content)["decoder"])
        if '"ByteLevel"' in about:
            bytes_of = {character: byte for byte, character in byte_characters().items()}
            return {
                number: bytes(map(bytes_of.__getitem__, token)) if bytes_of.keys() >= set(token) else token.encode()
                for token, number in vocabulary.items()
            }
        if '"ByteFallback"' in about:
            return {
                number: bytes([int(token[3:5], 16)]) for token, number in vocabulary.items() if _BYTE.fullmatch(token)
            }
        return {}

    def files(self) -> dict[str, bytes]:
        return {"huggingface.json": self.content.encode()}

    def about(self) -> dict[str, Any]:
        return {}

    def _decode_after(self, context: list[int], number: int) -> str:
        before = self.library.decode(context, skip_special_tokens=False)
        return self.library.decode([*context, number], skip_special_tokens=False)[len(before) :]

    def _bytes(self, ids: list[int]) -> int:
        return len(self.library.decode(ids, skip_special_tokens=False).encode())


def open_library(content: str) -> tokenizers.Tokenizer:
    """Load a tokenizer.json with the library, set to encode special tokens in the text as plain text.

    Raises:
        UserError: the library cannot load it.
    """
    import tokenizers  # here, because most tokenizers do without

    try:
        library = tokenizers.Tokenizer.from_str(content)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception itself, and panics are not Exceptions
        raise UserError(f"`tokenizers` cannot read it: {error}") from None
    library.encode_special_tokens = True
    return library


def prepared(source: dict[str, Any], special: Iterable[str]) -> str:
    """Return the content of huggingface.json for a parsed tokenizer.json and the names of its special tokens."""
    names = set(special)
    model = dict(source["model"])
    if "dropout" in model:
        model["dropout"] = None
    # A byte-level BPE encodes text only to what its merges produce, unless it ignores them.
    hidden = {name: _HIDDEN.format(name) for name in names} if _makes_any_entry(model) else {}
    _rename(model, hidden)
    fallback = byte_fallback_tokens(source["model"])
    added = [
        {**token, "content": hidden.get(token["content"], token["content"]), "special": token["content"] in names}
        for token in source.get("added_tokens") or []
        if token["content"] not in fallback
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


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename tokens in the vocabulary of a tokenizer.json's model, which is an object, or for Unigram a list."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def original(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    """Undo `prepared`: return a tokenizer.json in which special tokens have their names, and text may contain them."""
    made = json.loads(tokenizer.content)
    shown = {_HIDDEN.format(name): name for name in tokenizer.special_tokens}
    _rename(made["model"], shown)
    added = {token["id"]: {**token, "content": shown.get(token["content"], token["content"])}
             for token in made["added_tokens"]}  # fmt: skip
    for name, number in tokenizer.special_tokens.items():
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.setdefault(number, {"id": number, "content": name, **plain, "special": True})
    made["added_tokens"] = [added[number] for number in sorted(added)]
    return made  # type: ignore[no-any-return]


def byte_fallback_tokens(model: dict[str, Any]) -> set[str]:
    """Return a model's byte-fallback tokens, ``<0x0A>`` and so on, to which it encodes characters without a token.

    They must stay usable for text even if they are marked as added tokens: otherwise it becomes the unknown token.
    """
    if not model.get("byte_fallback"):
        return set()
    return {token if isinstance(token, str) else token[0] for token in model["vocab"]} & _BYTE_FALLBACK_TOKENS


def _makes_any_entry(model: dict[str, Any]) -> bool:
    """Return whether text can be encoded to any entry of the vocabulary, and not only to results of merges."""
    return model.get("type") != "BPE" or bool(model.get("ignore_merges"))
