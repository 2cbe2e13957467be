"""The tokenizer of a run as Hugging Face's files: tokenizer.json, tokenizer_config.json, special_tokens_map.json.

tokenizer.json (of the library `tokenizers`) lists a BPE's merges, and tiktoken's ranks do not. The merge that makes a
token is what the token's bytes are merged to with the ranks below its own: the two parts that are left. Tokens that
merges do not reach are found as whole words (``ignore_merges``), as tiktoken finds them.

AutoTokenizer reads the files as they are (``PreTrainedTokenizerFast``). As usual there, and other than here, the
name of a special token in the text becomes its id. No torch in here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers

from hpcgpt.errors import UserError
from hpcgpt.tokenizer import equivalence_texts, from_tiktoken, huggingface
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters
from hpcgpt.tokenizer.huggingface import LibraryTokenizer
from hpcgpt.tokenizer.interface import Tokenizer


def files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Return the contents of the files by name. `context`: the longest text that the model takes, in tokens."""
    end = next(name for name, number in tokenizer.special_tokens.items() if number == tokenizer.end_of_text)
    unknown = {} if tokenizer.unknown is None else {"unk_token": _name_of(tokenizer, tokenizer.unknown)}
    special = {"bos_token": end, "eos_token": end, **unknown}
    made = content(tokenizer)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": _adds_a_space(made),  # else some versions take their class's default
        **special,
    }
    contents = {
        "tokenizer.json": made,
        "tokenizer_config.json": about,
        "special_tokens_map.json": special,
    }
    return {name: _json(value) for name, value in contents.items()}


def content(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json of a tokenizer."""
    if isinstance(tokenizer, ByteLevelBPE):
        return _byte_level(tokenizer)
    assert isinstance(tokenizer, LibraryTokenizer)
    return huggingface.original(tokenizer)


def check(tokenizer: Tokenizer, encode: Callable[[str], list[int]], texts: Sequence[str]) -> None:
    """Check that `encode`, of what was written, gives the ids of `tokenizer`: for `texts`, and for difficult ones.

    Texts with the name of a special token are left out: see the module's docstring.

    Raises:
        UserError: it does not.
    """
    names = list(tokenizer.special_tokens)
    compared = [text for text in (*texts, *equivalence_texts.chosen()) if not any(name in text for name in names)]

    different = equivalence_texts.first_difference(compared, tokenizer.encode, encode)
    if different is not None:
        raise UserError(
            f"the tokenizer {tokenizer.name} cannot be exported: as AutoTokenizer reads it, it gives other ids, for "
            f"example for {different!r:.80}"
        )


def _byte_level(tokenizer: ByteLevelBPE) -> dict[str, Any]:
    characters = byte_characters()
    names = {token: "".join(characters[byte] for byte in token) for token in tokenizer.ranks}
    merges = [parts for token in sorted(tokenizer.ranks, key=tokenizer.ranks.__getitem__)
              if len(token) > 1 and len(parts := parts_of(token, tokenizer.ranks)) == 2]  # fmt: skip
    pattern = {"Regex": from_tiktoken.for_oniguruma(tokenizer.pattern)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in tokenizer.ranks.items()},
            "merges": [[names[left], names[right]] for left, right in merges],
        },
    }


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return what the bytes of a token are merged to with the ranks below its own, lowest first."""
    parts, limit = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the entries of special tokens, lowest id first."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ordered = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    return [{"id": number, "content": name, **plain} for name, number in ordered]


def _adds_a_space(made: dict[str, Any]) -> bool:
    """Return whether the pre-tokenizer of a tokenizer.json puts a space before a text, as ByteLevel may."""
    whole = made.get("pre_tokenizer") or {}
    return any(part.get("add_prefix_space", False) for part in (whole, *whole.get("pretokenizers", ())))


def _name_of(tokenizer: Tokenizer, number: int) -> str:
    assert isinstance(tokenizer, LibraryTokenizer)
    names = {id_: name for name, id_ in tokenizer.special_tokens.items()}
    return names.get(number) or str(tokenizers.Tokenizer.from_str(tokenizer.content).id_to_token(number))


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
