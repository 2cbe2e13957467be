"""Where a tokenizer comes from: GPT-2's own, or a folder that ``data_prep.train_tokenizer`` wrote.

GPT-2's merges lie in this package, so no network is needed. In that file a byte is written as a
printable character: itself where it is one, else the next free one from U+0100 on.
"""

from __future__ import annotations

from pathlib import Path

from hpcgpt import tokenizer
from hpcgpt.tokenizer import Tokenizer

# GPT-2's own pattern: contractions, words, numbers, punctuation and white space are never merged with
# each other. Written with possessive quantifiers as in tiktoken; it cuts exactly like the original.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
END_OF_TEXT = "<|endoftext|>"


def find(name: str) -> Tokenizer:
    """'gpt2', or the folder of a tokenizer.

    Raises:
        ValueError: neither.
    """
    if name == "gpt2":
        return gpt2()
    if Path(name).is_dir():
        return tokenizer.load(Path(name))
    raise ValueError(f"no tokenizer '{name}': it is neither gpt2 nor a folder with vocab.tiktoken in it")


def gpt2() -> Tokenizer:
    """GPT-2's tokenizer, 50,257 ids. Source: Radford et al., 2019; see data_prep/vocab/README.md."""
    merges = (Path(__file__).parent / "vocab" / "gpt2.bpe").read_text(encoding="utf-8").splitlines()[1:]
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_characters())}
    for merge in merges:
        token = bytes(to_byte[character] for character in merge.replace(" ", ""))
        ranks[token] = len(ranks)
    end = len(ranks)
    return Tokenizer("gpt2", GPT2_PATTERN, ranks, {END_OF_TEXT: end}, end)


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte, in the order of GPT-2's first 256 ids."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
