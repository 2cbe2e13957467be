"""Read a Hugging Face ``tokenizer.json``, as a byte-level BPE for tiktoken or a tokenizer for `tokenizers`.

A byte-level BPE is converted for tiktoken if that gives the same ids for every text, and a comparison on a few thousand
strings finds no difference. tiktoken gives the same ids under these conditions:

- There is no normalizer, and text is split by one pattern (or by GPT-2's, which ByteLevel implies).
- All 256 bytes have an id, each merge makes a higher id than the merges before it, and from lower ids. tiktoken merges
  any two neighbours whose bytes together are a token, lowest id first. Under this condition these are the neighbours
  that a merge names, because a token that can be reached is reached in only one way.
- Tokens that merges cannot reach are left out. Or, if the tokenizer looks up whole words before it merges
  (``ignore_merges``, as in Llama 3), every split of such a token is a merge.

All other tokenizers are run by `tokenizers`: see ``hpcgpt.tokenizer.huggingface``.

**Special tokens** are the added tokens that are marked as special or are in brackets, such as ``<tool_call>``. Text is
never encoded as one. Byte tokens (``<0x0A>``) are not special, however they are marked. Other added tokens, such as
GPT-NeoX's runs of spaces, are ordinary vocabulary.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpcgpt.errors import UserError
from hpcgpt.tokenizer import equivalence_texts, from_tiktoken, huggingface
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters
from hpcgpt.tokenizer.huggingface import LibraryTokenizer
from hpcgpt.tokenizer.interface import Tokenizer

# The first of these that exists is used. The bars of DeepSeek's are not ASCII.
USUAL_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>"]
_IN_BRACKETS = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_COMPARED = 2000
_TIMEOUT_S = 120


def read(path: Path, end_of_text: str = "") -> Tokenizer:
    """Read the tokenizer from a ``tokenizer.json``, or from a folder with one.

    Raises:
        UserError: it is missing, damaged, of a kind that `tokenizers` does not support, or has no end-of-text token.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        source = json.loads(file.read_bytes())
        if not isinstance(source, dict) or not isinstance(source.get("model"), dict) or "vocab" not in source["model"]:
            raise UserError("it has no model with a vocabulary")
        special = _special_tokens(source, _configured_end_of_text(file), end_of_text)
        end = _choose_end_of_text(special, _configured_end_of_text(file), end_of_text)
        name = file.parent.name if file.name == "tokenizer.json" else file.stem
        library = LibraryTokenizer(name, huggingface.prepared(source, special), special, special[end])
        _check_in_another_process(library.content)
        _check_special_tokens(library)
    except OSError as error:
        raise UserError(f"no tokenizer in {path}: {error.strerror} ({error.filename})") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        problem = str(error) if isinstance(error, ValueError) else f"unexpected content: {error!r}"
        raise UserError(f"{file}: not a Hugging Face tokenizer: {problem}") from None
    return _as_tiktoken(source, library) or library


def _special_tokens(source: dict[str, Any], configured: str, requested: str) -> dict[str, int]:
    """Return the names and ids of the special tokens, lowest id first."""
    pieces = huggingface.byte_fallback_tokens(source["model"])
    added = {t["content"]: t for t in source.get("added_tokens") or [] if t["content"] not in pieces}
    found = {
        name: int(token["id"]) for name, token in added.items() if token["special"] or _IN_BRACKETS.fullmatch(name)
    }
    vocabulary = source["model"]["vocab"]
    for name in filter(None, (configured, requested)):
        if name in added:
            found[name] = int(added[name]["id"])
        elif isinstance(vocabulary, dict) and name in vocabulary:
            found[name] = int(vocabulary[name])
        elif isinstance(vocabulary, list):
            found.update((name, number) for number, (token, _) in enumerate(vocabulary) if token == name)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _choose_end_of_text(special: dict[str, int], configured: str, requested: str) -> str:
    """Return the name of the special token that separates documents."""
    for name in [requested] if requested else [*USUAL_ENDS, configured]:
        if name in special:
            return name
    some = ", ".join(list(special)[:12]) or "none"
    wanted = f"'{requested}'" if requested else f"usual end of text ({', '.join(USUAL_ENDS)})"
    raise UserError(f"it has no {wanted}: name one of its special tokens with --end-of-text ({some})")


def _configured_end_of_text(file: Path) -> str:
    """Return eos_token from the tokenizer_config.json beside `file`; "" if there is none."""
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return ""
    about = json.loads(config.read_bytes())
    token = about.get("eos_token") if isinstance(about, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _check_in_another_process(content: str) -> None:
    """Read it in another process first, because some damaged files crash the process that reads them.

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


def _check_special_tokens(library: LibraryTokenizer) -> None:
    """Raise UserError if text is encoded as a special token, other than the one for unknown text.

    This also makes the library raise, now and not later, what it finds wrong only when it encodes.
    """
    unknown = library.unknown
    for name, number in library.special_tokens.items():
        if number == unknown == library.end_of_text:
            raise UserError(f"end-of-text {name} is also its token for unknown text")
        if number != unknown and number in library.encode(name):
            raise UserError(f"its model makes the special token {name} (id {number}) of plain text")


def _as_tiktoken(source: dict[str, Any], library: LibraryTokenizer) -> ByteLevelBPE | None:
    """Convert the tokenizer for tiktoken; return None if that is impossible."""
    pattern, ranks = _pattern(source), None
    if pattern and source.get("normalizer") is None and _only_special(source, library):
        ranks = _ranks(source["model"], library)
    if not pattern or ranks is None:
        return None
    converted = ByteLevelBPE.from_ranks(library.name, pattern, ranks, library.special_tokens, library.end_of_text)
    try:
        texts = [
            *equivalence_texts.chosen(),
            *equivalence_texts.fuzzed(_COMPARED, seed=1, special=list(library.special_tokens)[:50]),
        ]
        difference = equivalence_texts.first_difference(texts, converted.encode, library.encode)
        return None if difference is not None else converted
    except ValueError:  # a pattern that tiktoken's regular expressions do not support
        return None


def _only_special(source: dict[str, Any], library: LibraryTokenizer) -> bool:
    return all(token["content"] in library.special_tokens for token in source.get("added_tokens") or [])


def _pattern(source: dict[str, Any]) -> str | None:
    """Return the pattern that splits text; None unless it is a single one, applied before the bytes are mapped."""
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
    # As `hpcgpt export` writes them: so that an exported tokenizer has the fingerprint that it had before.
    ours = {from_tiktoken.for_oniguruma(pattern): pattern for pattern in from_tiktoken.PATTERNS}
    return ours.get(regex, regex) if isinstance(regex, str) else None


def _ranks(model: dict[str, Any], library: LibraryTokenizer) -> dict[bytes, int] | None:
    """Return the ranks of a byte-level BPE whose ids are in the order of its merges; None if they are not."""
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocabulary: dict[str, int] = {
        token: int(number) for token, number in model["vocab"].items() if token not in library.special_tokens
    }
    to_byte = {character: byte for byte, character in byte_characters().items()}
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if not all(character in vocabulary for character in to_byte) or not _is_ordered(merges, vocabulary):
        return None
    whole_words = bool(model.get("ignore_merges"))
    reachable = _reachable(model, vocabulary)
    if whole_words:
        known_merges = set(merges)
        kept = vocabulary
        for token in vocabulary.keys() - reachable:
            splits = [(token[:at], token[at:]) for at in range(1, len(token))]
            if not all(pair in known_merges for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary):
                return None
    else:
        kept = {token: number for token, number in vocabulary.items() if token in reachable}
    if not all(character in to_byte for token in kept for character in token):
        return None
    return {bytes(to_byte[character] for character in token): number for token, number in kept.items()}


def _is_ordered(merges: list[tuple[str, ...]], vocabulary: dict[str, int]) -> bool:
    """Return whether each merge makes an id not lower than the one before, from lower ids or single bytes."""
    highest = -1
    for left, right in merges:
        made = vocabulary.get(left + right, -1)
        parts = [vocabulary.get(part, made) for part in (left, right) if len(part) > 1]
        if made < highest or any(part >= made for part in parts):
            return False
        highest = made
    return True


def _reachable(model: dict[str, Any], vocabulary: dict[str, int]) -> set[str]:
    """Return the tokens whose text is encoded as just this token by merges alone."""
    import tokenizers

    merging = tokenizers.Tokenizer.from_str(json.dumps({"model": {**model, "dropout": None, "ignore_merges": False}}))
    reached = set()
    for token, number in vocabulary.items():
        parts = merging.model.tokenize(token)
        if len(parts) == 1 and parts[0].id == number:
            reached.add(token)
    return reached
