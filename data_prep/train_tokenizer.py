"""``python -m data_prep.train_tokenizer INPUT... --out DIR``: a byte-level BPE of one's own corpus.

It cuts text as GPT-2 does, starts from the 256 bytes, and learns merges until the vocabulary has the
wanted size, the end-of-text token included. The folder that it writes goes into ``make_shards
--tokenizer DIR``, where tiktoken runs it. Validation documents are left out, by make_shards' rule.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable

from data_prep import documents, inputs, split, vocabulary
from data_prep.reading import Reading
from hpcgpt import cli, shards, tokenizer
from hpcgpt.tokenizer import Tokenizer

# What vocabulary.GPT2_PATTERN says, in the words of the regular expressions of `tokenizers`.
_CUT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    if (out / "tokenizer.json").exists():
        raise ValueError(f"{out} exists already, with a tokenizer in it: choose another --out")
    if not 257 <= options.vocab_size < shards.WIDTHS["uint16"].most_ids:
        raise ValueError(f"--vocab-size {options.vocab_size}: expected 257 to {shards.WIDTHS['uint16'].most_ids - 1}")
    reading = Reading(options.text_key)
    units = inputs.units(inputs.find(options.INPUT), 64_000_000, reading)
    texts = (text for unit in units for text in documents.documents(unit, reading))
    trained = train(
        (text for text in texts if not split.is_validation(text, options.val_fraction)),
        options.vocab_size,
        name=out.name,
    )
    tokenizer.save(trained, out)
    print(f"{out}: {trained.vocab_size:,} ids")
    return 0


def train(texts: Iterator[str], vocab_size: int, name: str) -> Tokenizer:
    """A byte-level BPE with `vocab_size` ids, end-of-text the last of them.

    Raises:
        ValueError: the text is too small for that many merges.
    """
    model = Trainable(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_CUT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    to_byte = {character: byte for byte, character in vocabulary.byte_characters().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(vocabulary.byte_characters())}
    for left, right in merges:
        token = bytes(to_byte[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    if len(ranks) + 1 < vocab_size:
        raise ValueError(f"the text is too small for {vocab_size:,} ids: it gives {len(ranks) + 1:,}")
    end = len(ranks)
    return Tokenizer(name, vocabulary.GPT2_PATTERN, ranks, {vocabulary.END_OF_TEXT: end}, end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description="Train a byte-level BPE.")
    parser.add_argument("INPUT", nargs="+", help="as for data_prep.make_shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=32768, metavar="N", help="ids (default: 32768)")
    parser.add_argument("--text-key", default="text", help="jsonl: the key that the text is under (default: text)")
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, metavar="F", help="as given to make_shards later (default: 0.01)"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
