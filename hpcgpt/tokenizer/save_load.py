"""Saves and loads the tokenizer of a folder of shards, so that nothing else is needed to read them.

A tokenizer is a folder::

    tokenizer/
      tokenizer.json      kind, name, end_of_text, special_tokens, fingerprint, and for tiktoken the pattern
      vocab.tiktoken      of the kind "tiktoken": see hpcgpt.tokenizer.byte_level_bpe, which most tokenizers are
      huggingface.json    of the kind "tokenizers": see hpcgpt.tokenizer.huggingface, for all the others

Tokenizers with the same fingerprint give the same ids, and a damaged one does not match its fingerprint. Text is always
encoded as plain text: a literal ``<|endoftext|>`` in a corpus becomes the tokens of those 13 characters, never the id.
"""

from __future__ import annotations

import json
from pathlib import Path

from hpcgpt.errors import InputError, cannot_read
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.interface import Tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files into `folder`, which is created if necessary; tokenizer.json is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        atomic.keep(folder / name, content)
    about = {
        "kind": tokenizer.kind,
        "name": tokenizer.name,
        **tokenizer.about(),
        "special_tokens": tokenizer.special_tokens,
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
    }
    atomic.keep(folder / "tokenizer.json", (json.dumps(about, indent=1) + "\n").encode())


def load(folder: Path, fingerprint: str = "") -> Tokenizer:
    """Load the tokenizer in `folder`, of either kind.

    Raises:
        InputError: it is missing or damaged, or `fingerprint` is given and is not its own.
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
    # Imported here: most programs encode no text, and need not load the libraries.
    from hpcgpt.tokenizer import byte_level_bpe, huggingface

    about = json.loads((folder / "tokenizer.json").read_bytes())
    found: Tokenizer
    if about["kind"] == byte_level_bpe.ByteLevelBPE.kind:
        ranks = byte_level_bpe.parse_ranks((folder / "vocab.tiktoken").read_bytes())
        found = byte_level_bpe.ByteLevelBPE.from_ranks(
            about["name"], about["pattern"], ranks, about["special_tokens"], about["end_of_text"]
        )
    elif about["kind"] == huggingface.LibraryTokenizer.kind:
        content = (folder / "huggingface.json").read_text(encoding="utf-8")
        found = huggingface.LibraryTokenizer(about["name"], content, about["special_tokens"], about["end_of_text"])
    else:
        raise InputError(f"its kind is {about['kind']}")
    if found.fingerprint != about["fingerprint"]:
        raise InputError("its content does not fit its fingerprint")
    return found
