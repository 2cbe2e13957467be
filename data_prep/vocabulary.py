"""Where a tokenizer comes from.

===========================  ================================================================================
``gpt2``                     GPT-2's own; its merges lie in this package, so no network is needed
``cl100k_base``, ...         tiktoken's other encodings, see ``data_prep.published``
``PATH/cl100k_base.tiktoken``  one of these, its ranks brought along
``DIR``                      a folder that ``data_prep.train_tokenizer`` wrote, or ``tokenizer/`` beside shards
``DIR``, ``tokenizer.json``  a Hugging Face tokenizer, see ``data_prep.huggingface``
===========================  ================================================================================
"""

from __future__ import annotations

import json
from pathlib import Path

import tiktoken

from data_prep import huggingface, published
from hpcgpt import paths, tokenizer
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import Tokenizer
from hpcgpt.tokenizer_tiktoken import ByteLevelBPE, byte_characters


def find(name: str, end_of_text: str = "") -> Tokenizer:
    """The tokenizer that `name` stands for. `end_of_text` names a special token of it in place of the usual one.

    Raises:
        UserError: there is none, it is damaged, or it has no such end-of-text.
    """
    path = Path(paths.expand(name, "--tokenizer"))
    if name == "gpt2":
        found: Tokenizer = gpt2()
    elif name in published.PUBLISHED:
        found = published.find(name)
    elif path.suffix == ".tiktoken" and path.is_file():
        found = published.from_file(path)
    elif path.is_file() or (path.is_dir() and not _ours(path)):
        return huggingface.read(path, end_of_text)
    elif path.is_dir():
        found = tokenizer.load(path)
    elif name in tiktoken.list_encoding_names():
        found = _plugin(name)
    else:
        names = ", ".join(["gpt2", *published.PUBLISHED])
        raise UserError(
            f"no tokenizer '{name}': it is neither {names}, nor a folder with vocab.tiktoken in it, nor a Hugging Face "
            "tokenizer.json or a folder with one"
        )
    if end_of_text and found.special_tokens.get(end_of_text) != found.end_of_text:
        special = ", ".join(token for token, number in found.special_tokens.items() if number == found.end_of_text)
        raise UserError(f"tokenizer {found.name}: its end of text is {special}: leave --end-of-text {end_of_text} out")
    return found


def gpt2() -> ByteLevelBPE:
    """GPT-2's tokenizer, 50,257 ids. Source: Radford et al., 2019; see data_prep/vocab/README.md."""
    merges = (Path(__file__).parent / "vocab" / "gpt2.bpe").read_text(encoding="utf-8").splitlines()[1:]
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_characters())}
    for merge in merges:
        token = bytes(to_byte[character] for character in merge.replace(" ", ""))
        ranks[token] = len(ranks)
    end = len(ranks)
    return ByteLevelBPE("gpt2", published.GPT2_PATTERN, ranks, {published.END_OF_TEXT: end}, end)


def _ours(folder: Path) -> bool:
    """Is this a folder of ours, whole or damaged? A Hugging Face tokenizer.json has a model in it."""
    if not (folder / "tokenizer.json").is_file() or (folder / "vocab.tiktoken").exists():
        return True
    try:
        about = json.loads((folder / "tokenizer.json").read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(about, dict) and "fingerprint" in about


def _plugin(name: str) -> ByteLevelBPE:
    """An encoding that a tiktoken plugin on this machine brings along."""
    try:
        found = tiktoken.get_encoding(name)
    except Exception as error:  # whatever a plugin may raise, and `requests`
        raise UserError(f"tokenizer {name}: tiktoken cannot make it here: {error}") from None
    end = found._special_tokens.get(published.END_OF_TEXT)
    if end is None:
        raise UserError(f"tokenizer {name}: it has no {published.END_OF_TEXT}")
    return ByteLevelBPE(name, found._pat_str, found._mergeable_ranks, found._special_tokens, end)
