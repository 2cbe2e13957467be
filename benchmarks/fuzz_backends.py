"""Check that all backends give the same ids: ``python benchmarks/fuzz_backends.py --strings 200000 --seed 1``

Every code point, each between all kinds of others, then random strings (`hpcgpt.tokenizer.equivalence_texts`), with

- GPT-2's vocabulary: gigatoken against tiktoken, and tiktoken against `tokenizers` running the same merges;
- for each pattern that gigatoken is used with, a vocabulary of all pairs of bytes, whose ids show where text
  was split, which a real vocabulary mostly hides: gigatoken against tiktoken.

Prints a line for each comparison; at the first difference its string, and exit status 1.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.encode import encoders, gigatoken_encoder
from data_prep.encode.interface import Encoder
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, huggingface
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters

_GROUP = 2000
_END = "<|endoftext|>"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Compare the backends on random strings.")
    parser.add_argument("--strings", type=int, default=200_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    different = 0
    for name, one, other in comparisons():
        started_at, count, size = time.monotonic(), 0, 0
        for group in groups(options.strings, options.seed):
            found = difference(one, other, group)
            if found is not None:
                different += 1
                print(f"{name}: DIFFERENT ids for {found!r}")
                break
            count, size = count + len(group), size + sum(len(text.encode()) for text in group)
        else:
            took = time.monotonic() - started_at
            print(f"{name}: the same ids for {count:,} strings, {size / 1e6:.0f} MB, {took:.0f} s", flush=True)
    return 1 if different else 0


def comparisons() -> Iterator[tuple[str, Encoder, Encoder]]:
    """Yield the comparisons: a name, the encoder to test, and the reference."""
    gpt2 = find_tokenizer.gpt2()
    plain = encoders.choose(gpt2, "tiktoken")
    yield "gpt2, gigatoken", encoders.choose(gpt2, "gigatoken"), plain
    yield "gpt2, tokenizers", plain, encoders.choose(in_library(gpt2))
    for pattern, scheme in gigatoken_encoder.SCHEMES.items():
        pairs = equivalence_texts.all_pairs(pattern)
        yield (
            f"pairs of bytes, {scheme}, pattern {pattern[:24]}...",
            encoders.choose(pairs, "gigatoken"),
            encoders.choose(pairs, "tiktoken"),
        )


def groups(strings: int, seed: int) -> Iterator[list[str]]:
    # After the third plane, only a few marks and private-use characters are assigned.
    codes = (code for code in [*range(0x40000), *range(0xE0000, 0xE0200)] if not 0xD800 <= code <= 0xDFFF)
    texts: Iterator[str] = itertools.chain(
        equivalence_texts.chosen(),
        equivalence_texts.code_points(),
        equivalence_texts.between_others(codes),
        with_surrogates(strings // 100, seed),
        equivalence_texts.fuzzed(strings, seed, [_END]),
    )
    while group := list(itertools.islice(texts, _GROUP)):
        yield group


def with_surrogates(count: int, seed: int) -> Iterator[str]:
    """Make strings with lone surrogates, cleaned as documents are."""
    chance = random.Random(seed)
    for text in equivalence_texts.fuzzed(count, seed + 1):
        at = chance.randrange(len(text) + 1)
        broken = text[:at] + chr(chance.randrange(0xD800, 0xE000)) + text[at:]
        yield broken.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def difference(one: Encoder, other: Encoder, texts: list[str]) -> str | None:
    ids, counts = one.batch(texts)
    expected, expected_counts = other.batch(texts)
    if np.array_equal(ids, expected) and np.array_equal(counts, expected_counts):
        return None
    return equivalence_texts.first_difference(texts, lambda text: one.batch([text])[0].tolist(),
                                  lambda text: other.batch([text])[0].tolist())  # fmt: skip


def in_library(gpt2: ByteLevelBPE) -> huggingface.LibraryTokenizer:
    """Load GPT-2's merges into `tokenizers`, from OpenAI's list of merges."""
    merges = Path(__file__).parents[1] / "tests" / "tokenizer" / "gpt2.bpe"
    pairs = [line.split(" ") for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    letters = byte_characters()
    written = {"".join(letters[byte] for byte in token): rank for token, rank in gpt2.ranks.items()}
    source = {
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": written, "merges": pairs},
    }
    content = huggingface.prepared(source, [])
    return huggingface.LibraryTokenizer("gpt2", content, {_END: gpt2.end_of_text}, gpt2.end_of_text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
