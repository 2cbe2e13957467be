"""Find the tokenizer that was named.

=============================  ==============================================================================
``gpt2``                       GPT-2's; its ranks are in this package, so no network is needed
``cl100k_base``, ...           tiktoken's other encodings, see ``hpcgpt.tokenizer.from_tiktoken``
``PATH/cl100k_base.tiktoken``  one of these, from a file with its ranks
``DIR``                        a folder that ``data_prep.train_tokenizer`` wrote, or ``tokenizer/`` beside shards
``DIR``, ``tokenizer.json``    a Hugging Face tokenizer, see ``hpcgpt.tokenizer.from_huggingface``
=============================  ==============================================================================
"""

from __future__ import annotations

import json
from pathlib import Path

import tiktoken

from hpcgpt.config import paths
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import from_huggingface, from_tiktoken, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.interface import Tokenizer


def find(name: str, end_of_text: str = "") -> Tokenizer:
    """Find the tokenizer called `name`. Unless empty, `end_of_text` names the special token between documents.

    Raises:
        UserError: there is none, it is damaged, or it has no such end-of-text token.
    """
    path = Path(paths.expand(name, "--tokenizer"))
    if name == "gpt2":
        found: Tokenizer = gpt2()
    elif name in from_tiktoken.ENCODINGS:
        found = from_tiktoken.find(name)
    elif path.suffix == ".tiktoken" and path.is_file():
        found = from_tiktoken.from_file(path)
    elif path.is_file() or (path.is_dir() and not _is_own_format(path)):
        return from_huggingface.read(path, end_of_text)
    elif path.is_dir():
        found = save_load.load(path)
    elif name in tiktoken.list_encoding_names():
        found = _plugin(name)
    else:
        names = ", ".join(["gpt2", *from_tiktoken.ENCODINGS])
        raise UserError(
            f"no tokenizer '{name}': it is neither {names}, nor a folder with vocab.tiktoken in it, nor a Hugging Face "
            "tokenizer.json or a folder with one"
        )
    if end_of_text and found.special_tokens.get(end_of_text) != found.end_of_text:
        special = ", ".join(token for token, number in found.special_tokens.items() if number == found.end_of_text)
        raise UserError(f"tokenizer {found.name}: its end of text is {special}: leave --end-of-text {end_of_text} out")
    return found


def gpt2() -> ByteLevelBPE:
    """Make GPT-2's tokenizer, 50,257 ids. Source: Radford et al., 2019; see hpcgpt/tokenizer/vocab/README.md."""
    ranks = (Path(__file__).parent / "vocab" / "gpt2.tiktoken").read_bytes()
    end = 50256
    return ByteLevelBPE("gpt2", from_tiktoken.GPT2_PATTERN, ranks, {from_tiktoken.END_OF_TEXT: end}, end)


def _is_own_format(folder: Path) -> bool:
    """Return whether hpcgpt wrote this folder, even if it is damaged. Only its tokenizer.json has a fingerprint."""
    if not (folder / "tokenizer.json").is_file() or (folder / "vocab.tiktoken").exists():
        return True
    try:
        about = json.loads((folder / "tokenizer.json").read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(about, dict) and "fingerprint" in about


def _plugin(name: str) -> ByteLevelBPE:
    """Make an encoding of a tiktoken plugin that is installed here."""
    try:
        found = tiktoken.get_encoding(name)
    except Exception as error:  # a plugin may raise anything, and so may `requests`
        raise UserError(f"tokenizer {name}: tiktoken cannot make it here: {error}") from None
    end = found._special_tokens.get(from_tiktoken.END_OF_TEXT)
    if end is None:
        raise UserError(f"tokenizer {name}: it has no {from_tiktoken.END_OF_TEXT}")
    return ByteLevelBPE.from_ranks(name, found._pat_str, found._mergeable_ranks, found._special_tokens, end)
