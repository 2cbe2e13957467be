"""Train a byte-level BPE on a corpus: ``python -m data_prep.train_tokenizer INPUT... --out DIR``.

Text is split into words as GPT-2 or GPT-4 does. Training starts from the 256 bytes and learns merges until the
vocabulary, with the end-of-text token, has the requested size. ``make_shards --tokenizer DIR`` uses the folder that is
written; tiktoken runs the tokenizer. Validation documents are left out, by the same rule as in make_shards.

The training sample consists of whole documents, chosen by a hash of their text: so they come from the whole corpus and
are the same at each run. Of a corpus much larger than the sample only every n-th unit is read.

Memory: the sample, and about 110 bytes for each byte of its *distinct* words, which `tokenizers` needs. English has
few; in Chinese most clauses occur once. So the sample ends where its distinct words reach 1/32 of --sample-mb or 16 MB,
whichever is more. In all that takes about 4.5 times --sample-mb, or 2 GB.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import xxhash
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Trainable
from tqdm import tqdm

from data_prep.pipeline import holdout
from data_prep.text import accounting, inputs, unread
from data_prep.text.documents import read_documents
from data_prep.text.options import Skipped, TextOptions, add_text_arguments
from data_prep.text.unread import UnreadFile
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.tokenizer import from_tiktoken, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters

# Name -> pattern for tiktoken, and the equivalent regular expression for `tokenizers`, in whose syntax $ is the end of
# a line, and {1,3}+ repeats.
_PATTERNS = {
    "gpt2": (from_tiktoken.GPT2_PATTERN, r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
    "gpt4": (
        from_tiktoken.GPT4_PATTERN,
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]"
        r"|\s+(?!\S)|\s",
    ),
}
_UNIT_BYTES = 16_000_000
_READ_PER_SAMPLE = 4  # of a large corpus, about this many times the sample is read, to choose from
_PROBE_BYTES = 4_000_000
_WORDS_SHARE, _FEWEST_WORD_BYTES = 32, 16_000_000
# Close enough to the patterns to estimate the size of the distinct words.
_WORD = re.compile(r"\w+|[^\w\s]+")
# Runs of letters, of punctuation, of white space or of digits, of which the trainer would make one word each. Its time
# grows with the square of a word's length: a million letters, as a genome has, take hours.
_LETTERS, _SIGNS = r"(?<![^\W\d_])[^\W\d_]{10000,}", r"(?<!(?:[^\w\s]|_))(?:[^\w\s]|_){10000,}"
_BLANKS, _DIGITS = r"(?<!\s)\s{10000,}", r"(?<!\d)\d{10000,}"
_LONG_WORD = {
    "gpt2": re.compile(f"{_LETTERS}|{_SIGNS}|{_BLANKS}|{_DIGITS}"),
    "gpt4": re.compile(f"{_LETTERS}|{_SIGNS}|{_BLANKS}"),  # which splits digits into groups of three
}


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    out = Path(paths.expand(arguments.out, "--out"))
    if (out / "tokenizer.json").exists():
        raise UserError(f"{out} exists already, with a tokenizer in it: choose another --out")
    # Alone it is what a run left that was killed before it wrote tokenizer.json.
    if (out / "vocab.tiktoken").exists() and _visible(out) != ["vocab.tiktoken"]:
        raise UserError(f"{out / 'vocab.tiktoken'} would be overwritten: choose another --out, or move that file away")
    most = shard_format.WIDTHS["uint16"].most_ids
    if not 257 <= arguments.vocab_size <= most:
        raise UserError(f"--vocab-size {arguments.vocab_size}: expected 257 to {most}")
    if arguments.sample_mb < 1:
        raise UserError(f"--sample-mb {arguments.sample_mb}: expected 1 or more")
    _check_folder(out)
    sample_bytes = arguments.sample_mb * 1_000_000
    sample = draw_sample(_training_texts(arguments, sample_bytes), sample_bytes)
    all_bytes, documents = sum(map(len, sample)), len(sample)
    del sample[count_fitting(sample, max(_FEWEST_WORD_BYTES, sample_bytes // _WORDS_SHARE)) :]
    left_out = f" (of {all_bytes / 1e6:,.1f}: too many words for the memory)" if len(sample) < documents else ""
    print(
        f"sample: {counted(len(sample), 'document')}, {sum(map(len, sample)) / 1e6:,.1f} MB{left_out}; "
        f"learning {arguments.vocab_size:,} ids",
        flush=True,
    )
    trained = train((text.decode() for text in sample), arguments.vocab_size, out.name, arguments.pattern)
    save_load.save(trained, out)
    print(f"{out}: {trained.vocab_size:,} ids{_density(trained, sample)}")
    return 0


def _visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def _check_folder(out: Path) -> None:
    """Write a byte in the folder, so that a wrong --out is not found only after hours of training.

    A new one is removed again: a run that fails leaves none.

    Raises:
        UserError: it is a file.
        OSError: it cannot be made, or not be written to.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose another --out")
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        file.write(b"x")
    if is_new:
        out.rmdir()


def draw_sample(texts: Iterable[str], most_bytes: int) -> list[bytes]:
    """Choose the texts with the lowest hashes, lowest first, of together at most `most_bytes` in UTF-8.

    The choice depends neither on the order of the texts nor on how many copies of one there are.
    """
    kept: list[tuple[int, bytes]] = []  # a heap with negated hashes: the first is dropped next
    held, seen, limit = 0, set[int](), 1 << 64  # a hash that was dropped stays out, so the order does not matter
    for text in texts:
        content = text.encode()
        rank = xxhash.xxh3_64_intdigest(content, seed=1)
        if rank >= limit or rank in seen:
            continue
        heapq.heappush(kept, (-rank, content))
        seen.add(rank)
        held += len(content)
        while held > most_bytes and len(kept) > 1:
            negated, dropped = heapq.heappop(kept)
            limit = -negated
            seen.discard(limit)
            held -= len(dropped)
    return [content for _, content in sorted(kept, reverse=True)]


def count_fitting(sample: Sequence[bytes], most_word_bytes: int) -> int:
    """Count the first texts whose distinct words take at most `most_word_bytes` together; at least 1."""
    words, held = set[int](), 0
    for number, content in enumerate(sample):
        for word in map(str.encode, _WORD.findall(content.decode())):
            # Only a hash is kept: the words themselves would take the memory that is to be saved.
            key = xxhash.xxh3_64_intdigest(word)
            if key not in words:
                words.add(key)
                held += len(word)
        if held > most_word_bytes and number:
            return number
    return len(sample)


def _without_long_words(texts: Iterator[str], pattern: str) -> Iterator[str]:
    """Yield the texts without such words, and print how many there were."""
    long_word, count = _LONG_WORD[pattern], 0
    for text in texts:
        kept, found = long_word.subn("", text) if len(text) >= 10_000 else (text, 0)
        count += found
        yield kept
    if count:
        print(f"left out: {counted(count, 'word')} of 10,000 characters or more")


def train(texts: Iterator[str], vocab_size: int, name: str, pattern: str = "gpt2") -> ByteLevelBPE:
    """Train a byte-level BPE with `vocab_size` ids, of which the last is end-of-text. Very long words are left out.

    Raises:
        UserError: the text is too small for that many merges.
    """
    tiktoken_pattern, regex = _PATTERNS[pattern]
    model = Trainable(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=sys.stderr.isatty()
    )
    model.train_from_iterator(_without_long_words(texts, pattern), trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    to_byte = {character: byte for byte, character in byte_characters().items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_characters())}
    for left, right in merges:
        token = bytes(to_byte[character] for character in left + right)
        ranks.setdefault(token, len(ranks))
    if len(ranks) + 1 < vocab_size:
        raise UserError(f"the text is too small for {vocab_size:,} ids: it gives {len(ranks) + 1:,}")
    end = len(ranks)
    return ByteLevelBPE.from_ranks(name, tiktoken_pattern, ranks, {from_tiktoken.END_OF_TEXT: end}, end)


def _training_texts(arguments: argparse.Namespace, sample_bytes: int) -> Iterator[str]:
    """Yield the training documents of the corpus, or of units spread evenly over it, with a progress bar."""
    options = TextOptions.from_arguments(arguments)
    skipped: list[Skipped] = []
    others: list[UnreadFile] = []
    counts: Counter[str] = Counter()
    skips = options.on_bad_input == "skip"
    files = inputs.find(arguments.INPUT, skipped if skips else None, others, options.text_key)
    unread.check(others, arguments.ignore_other_files)
    inputs.check_options(files, options)
    units = inputs.units(files, _UNIT_BYTES, options)
    sizes = [sum(part.stop - part.start for part in unit) for unit in units]
    stride = max(1, sum(sizes) // (_READ_PER_SAMPLE * sample_bytes))
    chosen = range(0, len(units), stride)
    total = sum(sizes[number] for number in chosen)
    with tqdm(total=total, unit="B", unit_scale=True, desc="text read", disable=not sys.stderr.isatty()) as bar:
        for number in chosen:
            # A list for each unit, because only the first bad inputs of a unit are listed one by one.
            of_unit: list[Skipped] = []
            for text in read_documents(units[number], options, of_unit, counts):
                if not holdout.is_validation(text, arguments.val_fraction):
                    yield text
            counts["skipped"] += sum(row.count for row in of_unit)
            bar.update(sizes[number])
    counts["skipped"] += len(skipped)
    spread = "" if stride == 1 else f", from {len(chosen):,} of {len(units):,} parts spread over them"
    print(f"read: {counted(len(files), 'file')}{spread}", flush=True)
    for what in filter(None, (accounting.left_out(counts), accounting.changed(counts, 0))):
        print(f"left out or changed: {what.replace(', listed in skipped.jsonl', '')}", flush=True)


def _density(trained: ByteLevelBPE, sample: Sequence[bytes]) -> str:
    """Describe how much text a token holds, on the first few documents of the sample."""
    probe, held = [], 0
    for content in sample:
        probe.append(content.decode())
        held += len(content)
        if held > _PROBE_BYTES:
            break
    tokens = sum(len(trained.encode(text)) for text in probe)
    characters = sum(map(len, probe))
    return f", {held / tokens:.2f} bytes and {characters / tokens:.2f} characters per token of the sample"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description="Train a byte-level BPE.")
    parser.add_argument("INPUT", nargs="+", help="as for data_prep.make_shards")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32768,
        metavar="N",
        help="number of ids, with end-of-text, at most 65536 (default: 32768)",
    )
    parser.add_argument(
        "--pattern", choices=list(_PATTERNS), default="gpt2", help="how text is split into words (default: gpt2)"
    )
    parser.add_argument(
        "--sample-mb",
        type=int,
        default=1024,
        metavar="MB",
        help="size of the training sample, taken evenly from the whole corpus (default: 1024)",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="the same as for make_shards later (default: 0.01)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
