"""A Hugging Face ``tokenizer.json`` -> one of our two kinds of tokenizer.

A byte-level BPE becomes a tiktoken one where that gives the same ids for every text, and a comparison on a few
thousand strings finds no difference. It does if these hold:

- there is no normalizer, and text is cut by one pattern (or by GPT-2's, which ByteLevel stands for);
- all 256 bytes have an id, and of two merges the first makes the lower id, out of lower ids. tiktoken merges any
  two neighbours whose bytes together are a token, lowest id first; with these conditions the neighbours that
  it finds are those that a merge names, because a token that is reached at all is reached by one way;
- what cannot be reached by merges is left out, or, where the tokenizer takes whole words before it merges
  (``ignore_merges``, as Llama 3's), every way to split such a token is a merge.

Everything else stays with `tokenizers`: see ``hpcgpt.tokenizer.huggingface``.

**Special tokens** are the added tokens that are marked special or stand in brackets, as ``<tool_call>`` does:
text never becomes one. The pieces that stand for bytes (``<0x0A>``) are none, however they are
marked. Other added tokens, such as GPT-NeoX's runs of blanks, are ordinary vocabulary.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import tokenizers

from data_prep.encode import equivalence_texts, from_tiktoken
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import huggingface
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters
from hpcgpt.tokenizer.huggingface import LibraryTokenizer
from hpcgpt.tokenizer.interface import Tokenizer

# In this order; the bars of DeepSeek's are no ASCII.
USUAL_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"]
_MARKER = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_COMPARED = 2000
_TIMEOUT_S = 120


def read(path: Path, end_of_text: str = "") -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``, or in the folder that holds one.

    Raises:
        UserError: it is missing, damaged, of a form that `tokenizers` does not know, or has no end-of-text.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        source = json.loads(file.read_bytes())
        if not isinstance(source, dict) or not isinstance(source.get("model"), dict) or "vocab" not in source["model"]:
            raise UserError("it has no model with a vocabulary")
        special = _special(source, _configured_end(file), end_of_text)
        end = _end(special, _configured_end(file), end_of_text)
        name = file.parent.name if file.name == "tokenizer.json" else file.stem
        library = LibraryTokenizer(name, huggingface.prepared(source, special), special, special[end])
        _survive(library.content)
        _check(library)
    except OSError as error:
        raise UserError(f"no tokenizer in {path}: {error.strerror} ({error.filename})") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        told = str(error) if isinstance(error, ValueError) else f"unexpected content: {error!r}"
        raise UserError(f"{file}: not a Hugging Face tokenizer: {told}") from None
    return _as_tiktoken(source, library) or library


def _special(source: dict[str, Any], configured: str, asked: str) -> dict[str, int]:
    """Names and ids of the special tokens, lowest id first."""
    pieces = huggingface.byte_fallback_tokens(source["model"])
    added = {t["content"]: t for t in source.get("added_tokens") or [] if t["content"] not in pieces}
    found = {name: int(token["id"]) for name, token in added.items() if token["special"] or _MARKER.fullmatch(name)}
    vocabulary = source["model"]["vocab"]
    for name in filter(None, (configured, asked)):
        if name in added:
            found[name] = int(added[name]["id"])
        elif isinstance(vocabulary, dict) and name in vocabulary:
            found[name] = int(vocabulary[name])
        elif isinstance(vocabulary, list):
            found.update((name, number) for number, (token, _) in enumerate(vocabulary) if token == name)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _end(special: dict[str, int], configured: str, asked: str) -> str:
    """Which of the special tokens separates documents."""
    for name in [asked] if asked else [*USUAL_ENDS, configured]:
        if name in special:
            return name
    some = ", ".join(list(special)[:12]) or "none"
    wanted = f"'{asked}'" if asked else f"usual end of text ({', '.join(USUAL_ENDS)})"
    raise UserError(f"it has no {wanted}: name one of its special tokens with --end-of-text ({some})")


def _configured_end(file: Path) -> str:
    """eos_token of the tokenizer_config.json beside it, if there is one."""
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return ""
    about = json.loads(config.read_bytes())
    token = about.get("eos_token") if isinstance(about, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _survive(content: str) -> None:
    """Let another process read it first: some damaged files end the process that reads them.

    Raises:
        UserError: that process was killed by a signal, or did not end.
    """
    code = "import sys, tokenizers; tokenizers.Tokenizer.from_str(sys.stdin.buffer.read().decode()).encode('a b')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], input=content.encode(), capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"`tokenizers` does not finish reading it within {_TIMEOUT_S} s") from None
    if done.returncode < 0:
        raise UserError("`tokenizers` crashes when it reads it")


def _check(library: LibraryTokenizer) -> None:
    """Nothing that the library would find wrong only later, and no text that becomes a special token, but for the
    one that stands for what is unknown."""
    unknown = library.unknown
    for name, number in library.special_tokens.items():
        if number == unknown == library.end_of_text:
            raise UserError(f"end-of-text {name} is also its token for unknown text")
        if number != unknown and number in library.encode(name):
            raise UserError(f"its model makes the special token {name} (id {number}) of plain text")


def _as_tiktoken(source: dict[str, Any], library: LibraryTokenizer) -> ByteLevelBPE | None:
    """The same tokenizer for tiktoken, if that is possible."""
    pattern, ranks = _pattern(source), None
    if pattern and source.get("normalizer") is None and _only_special(source, library):
        ranks = _ranks(source["model"], library)
    if not pattern or ranks is None:
        return None
    made = ByteLevelBPE(library.name, pattern, ranks, library.special_tokens, library.end_of_text)
    try:
        texts = [
            *equivalence_texts.chosen(),
            *equivalence_texts.fuzzed(_COMPARED, seed=1, special=list(library.special_tokens)[:50]),
        ]
        return None if equivalence_texts.first_difference(texts, made.encode, library.encode) is not None else made
    except ValueError:  # a pattern that Rust's regular expressions don't know
        return None


def _only_special(source: dict[str, Any], library: LibraryTokenizer) -> bool:
    return all(token["content"] in library.special_tokens for token in source.get("added_tokens") or [])


def _pattern(source: dict[str, Any]) -> str | None:
    """How text is cut, if it is by one pattern before bytes are mapped to characters."""
    step = source.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return from_tiktoken.GPT2_PATTERN if steps[0].get("use_regex", True) else None
    split = steps[0]
    whole = (split.get("behavior"), split.get("invert")) in (("Isolated", False), ("Removed", True))
    regex = split.get("pattern", {}).get("Regex")
    if len(steps) > 2 or split.get("type") != "Split" or steps[-1].get("use_regex", True) or not whole:
        return None
    return regex if isinstance(regex, str) else None


def _ranks(model: dict[str, Any], library: LibraryTokenizer) -> dict[bytes, int] | None:
    """The ranks of a byte-level BPE whose ids follow its merges; None if they do not."""
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocabulary: dict[str, int] = {
        token: int(number) for token, number in model["vocab"].items() if token not in library.special_tokens
    }
    to_byte = {character: byte for byte, character in byte_characters().items()}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if not all(character in vocabulary for character in to_byte) or not _ordered(merges, vocabulary):
        return None
    whole_words = bool(model.get("ignore_merges"))
    reached = _reached(model, vocabulary)
    if whole_words:
        ways = set(merges)
        kept = vocabulary
        for token in vocabulary.keys() - reached:
            splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            if not all(pair in ways for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary):
                return None
    else:
        kept = {token: number for token, number in vocabulary.items() if token in reached}
    if not all(character in to_byte for token in kept for character in token):
        return None
    return {bytes(to_byte[character] for character in token): number for token, number in kept.items()}


def _ordered(merges: list[tuple[str, ...]], vocabulary: dict[str, int]) -> bool:
    """Does each merge make an id as high as the one before, or higher, out of ids that are lower or single bytes?"""
    highest = -1
    for left, right in merges:
        made = vocabulary.get(left + right, -1)
        parts = [vocabulary.get(part, made) for part in (left, right) if len(part) > 1]
        if made < highest or any(part >= made for part in parts):
            return False
        highest = made
    return True


def _reached(model: dict[str, Any], vocabulary: dict[str, int]) -> set[str]:
    """The tokens that their own text becomes by merges alone."""
    merging = tokenizers.Tokenizer.from_str(json.dumps({"model": {**model, "dropout": None, "ignore_merges": False}}))
    reached = set()
    for token, number in vocabulary.items():
        parts = merging.model.tokenize(token)
        if len(parts) == 1 and parts[0].id == number:
            reached.add(token)
    return reached
