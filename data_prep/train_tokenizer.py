"""``python -m data_prep.train_tokenizer INPUT... --out DIR``: a byte-level BPE of one's own corpus.

It cuts text as GPT-2 or GPT-4 does, starts from the 256 bytes, and learns merges until the vocabulary has the
wanted size, the end-of-text token included. The folder that it writes goes into ``make_shards
--tokenizer DIR``, where tiktoken runs it. Validation documents are left out, by make_shards' rule.

It learns from a sample: whole documents, chosen by a hash of their text, so from everywhere in the corpus and
the same ones every time. Of a corpus much larger than the sample only every so-manieth unit is read.

Memory: the sample, and about 110 bytes for each byte of its *different* words, which `tokenizers` needs to learn.
English has few; most clauses of Chinese occur once. So the sample ends where its different words reach 1/32 of
--sample-mb or 16 MB, whichever is more: in all about 4.5 times --sample-mb, or 2 GB.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable
from tqdm import tqdm

from data_prep.encode import from_tiktoken
from data_prep.pipeline import holdout
from data_prep.text import accounting, inputs, unread
from data_prep.text import options as text_options
from data_prep.text.documents import documents
from data_prep.text.options import Skipped
from data_prep.text.unread import Unread
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters

# What the patterns of data_prep.encode.from_tiktoken say, in the words of the regular expressions of `tokenizers`,
# where $ is the end of a line and {1,3}+ repeats.
_CUTS = {
    "gpt2": (from_tiktoken.GPT2_PATTERN, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "gpt4": (
        from_tiktoken.GPT4_PATTERN,
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
    ),
}
_UNIT_BYTES = 16_000_000
# So many times the sample is read of a large corpus, to choose from.
_CHOICE = 4
_PROBE_BYTES = 4_000_000
_WORDS_SHARE, _FEWEST_WORD_BYTES = 32, 16_000_000
# Near enough to what the patterns cut to tell how many different words there are.
_WORD = re.compile(r"\w+|[^\w\s]+")


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    out = Path(paths.expand(options.out, "--out"))
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} exists already, with a tokenizer in it: choose another --out")
    most = shard_format.WIDTHS["uint16"].most_ids
    if not 257 <= options.vocab_size <= most:
        raise UserError(f"--vocab-size {options.vocab_size}: expected 257 to {most}")
    if options.sample_mb < 1:
        raise UserError(f"--sample-mb {options.sample_mb}: expected 1 or more")
    sample_bytes = options.sample_mb * 1_000_000
    sample = sampled(_texts(options, sample_bytes), sample_bytes)
    all_bytes, documents = sum(map(len, sample)), len(sample)
    del sample[fitting(sample, max(_FEWEST_WORD_BYTES, sample_bytes // _WORDS_SHARE)) :]
    left_out = f" (of {all_bytes / 1e6:,.1f}: more words than memory for them)" if len(sample) < documents else ""
    print(
        f"sample: {len(sample):,} documents, {sum(map(len, sample)) / 1e6:,.1f} MB{left_out}; "
        f"learning {options.vocab_size:,} ids",
        flush=True,
    )
    trained = train((text.decode() for text in sample), options.vocab_size, out.name, options.pattern)
    save_load.save(trained, out)
    print(f"{out}: {trained.vocab_size:,} ids{_density(trained, sample)}")
    return 0


def sampled(texts: Iterable[str], most_bytes: int) -> list[bytes]:
    """Texts of together at most `most_bytes` UTF-8 bytes (n,): those with the lowest hashes, lowest first.

    Which they are depends neither on the order of the texts nor on how many copies of one there are.
    """
    kept: list[tuple[int, bytes]] = []  # a heap whose first is the next to go: hashes are negative in it
    held, seen, limit = 0, set[int](), 1 << 64  # a hash that went once stays out, so the order does not matter
    for text in texts:
        content = text.encode()
        rank = xxhash.xxh3_64_intdigest(content, seed=1)
        if rank >= limit or rank in seen:
            continue
        heapq.heappush(kept, (-rank, content))
        seen.add(rank)
        held += len(content)
        while held > most_bytes and len(kept) > 1:
            gone, dropped = heapq.heappop(kept)
            limit = -gone
            seen.discard(limit)
            held -= len(dropped)
    return [content for _, content in sorted(kept, reverse=True)]


def fitting(sample: Sequence[bytes], most_word_bytes: int) -> int:
    """How many texts, from the first, have different words of at most `most_word_bytes` together; at least one."""
    words, held = set[int](), 0
    for number, content in enumerate(sample):
        for word in map(str.encode, _WORD.findall(content.decode())):
            # A hash, since the words themselves would take the memory that this is to spare.
            key = xxhash.xxh3_64_intdigest(word)
            if key not in words:
                words.add(key)
                held += len(word)
        if held > most_word_bytes and number:
            return number
    return len(sample)


def train(texts: Iterator[str], vocab_size: int, name: str, pattern: str = "gpt2") -> ByteLevelBPE:
    """A byte-level BPE with `vocab_size` ids, end-of-text the last of them.

    Raises:
        UserError: the text is too small for that many merges.
    """
    written, cut = _CUTS[pattern]
    model = Trainable(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    model.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_characters())}
    for left, right in merges:
        token = bytes(to_byte[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    if len(ranks) + 1 < vocab_size:
        raise UserError(f"the text is too small for {vocab_size:,} ids: it gives {len(ranks) + 1:,}")
    end = len(ranks)
    return ByteLevelBPE(name, written, ranks, {from_tiktoken.END_OF_TEXT: end}, end)


def _texts(options: argparse.Namespace, sample_bytes: int) -> Iterator[str]:
    """The training documents of the corpus, or of units spread evenly over it, with a progress bar."""
    how = text_options.asked(options)
    skipped: list[Skipped] = []
    others: list[Unread] = []
    counts: Counter[str] = Counter()
    sources = inputs.find(options.INPUT, skipped if how.on_bad_input == "skip" else None, others, how.text_key)
    unread.check(others, options.ignore_other_files)
    units = inputs.units(sources, _UNIT_BYTES, how)
    sizes = [sum(piece.stop - piece.start for piece in unit) for unit in units]
    stride = max(1, sum(sizes) // (_CHOICE * sample_bytes))
    chosen = range(0, len(units), stride)
    total = sum(sizes[number] for number in chosen)
    with tqdm(total=total, unit="B", unit_scale=True, desc="text read", disable=not sys.stderr.isatty()) as bar:
        for number in chosen:
            # A list for each unit, since it takes so many at most.
            of_unit: list[Skipped] = []
            for text in documents(units[number], how, of_unit, counts):
                if not holdout.is_validation(text, options.val_fraction):
                    yield text
            counts["skipped"] += sum(row.count for row in of_unit)
            bar.update(sizes[number])
    counts["skipped"] += len(skipped)
    part = "" if stride == 1 else f", from {len(chosen):,} of {len(units):,} parts spread over them"
    print(f"read: {len(sources):,} files{part}", flush=True)
    told = [accounting.left_out(counts).replace(", listed in skipped.jsonl", ""), accounting.changed(counts, 0)]
    for what in filter(None, told):
        print(f"left out or changed: {what.replace(', listed in skipped.jsonl', '')}", flush=True)


def _density(trained: ByteLevelBPE, sample: Sequence[bytes]) -> str:
    """What a token holds, on the first few documents of the sample."""
    probe, held = [], 0
    for content in sample:
        probe.append(content.decode())
        held += len(content)
        if held > _PROBE_BYTES:
            break
    tokens = sum(len(trained.encode(text)) for text in probe)
    characters = sum(map(len, probe))
    return f", {held / tokens:.2f} bytes and {characters / tokens:.2f} characters a token of the sample"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description="Train a byte-level BPE.")
    parser.add_argument("INPUT", nargs="+", help="as for data_prep.make_shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32768,
        metavar="N",
        help="ids, end-of-text among them, 65536 at most (default: 32768)",
    )
    parser.add_argument(
        "--pattern", choices=list(_CUTS), default="gpt2", help="how text is cut before merging (default: gpt2)"
    )
    parser.add_argument(
        "--sample-mb",
        type=int,
        default=1024,
        metavar="MB",
        help="text to learn from, taken evenly from the whole corpus (default: 1024)",
    )
    text_options.add_options(parser)
    parser.add_argument(
        "--val-fraction", type=float, default=0.01, metavar="F", help="as given to make_shards later (default: 0.01)"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
