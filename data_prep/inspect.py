"""``python -m data_prep.inspect DIR``: what is in a folder of shards.

Without more, what the manifest says, and how long the documents are. ``--document K`` shows the text of one,
page by page; ``--histogram`` how often each id occurs. Shards are read in pieces, so memory stays flat at
any size: a count for each id, and one for each length of a document up to a million tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.text import accounting, unread
from data_prep.token_files import chunked_file
from data_prep.token_files.megatron_index import Index
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import Manifest, Shard, Tokens
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.tokenizer import interface, save_load
from hpcgpt.tokenizer.interface import Tokenizer

PAGE_TOKENS = 512
AROUND = 64  # a page is decoded with so many tokens around it
PIECE_DOCUMENTS = 1 << 20
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LONG = 1 << 20  # documents of this many tokens are counted by name and not in a table


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folder = Path(paths.expand(options.DIR, "DIR"))
    manifest = shard_format.read_manifest(folder)
    found: dict[str, Any] = {}
    if options.document is not None:
        found["document"] = page(folder, manifest, options.split or "train", options.document, options.page)
    if options.histogram:
        found["histogram"] = histogram(folder, manifest, options.split, options.top)
    if not found:
        found = summary(folder, manifest)
    print(json.dumps(found, ensure_ascii=False) if options.json else "\n".join(_lines(found)))
    return 0


# --- what is in it ---------------------------------------------------------------------------------


def summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What the manifest says, split by split, and the lengths of the documents."""
    splits: dict[str, Any] = {}
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        tokens, documents = sum(s.tokens for s in of), sum(s.documents for s in of)
        if not tokens or not documents:
            raise UserError(f"{folder}: its {name} shards are empty")
        characters, text_bytes = sum(s.characters for s in of), sum(s.text_bytes for s in of)
        splits[name] = {
            "shards": len(of),
            "documents": documents,
            "tokens": tokens,
            "characters": characters,
            "text_bytes": text_bytes,
            "characters_per_token": characters / tokens,
            "bytes_per_token": text_bytes / tokens,
            "document_tokens": {"mean": tokens / documents} | Lengths.of(folder, of).describe(),
        }
    return {
        "dir": str(folder),
        "digest": manifest.digest,
        "dtype": manifest.dtype,
        "tokenizer": manifest.tokenizer,
        "splits": splits,
        "inputs": manifest.inputs,
        "split_rule": manifest.split_rule,
        "counts": manifest.counts,
        "unread": manifest.unread,
    }


@dataclass
class Lengths:
    """How many documents there are of each length in tokens, end-of-text among them: `short[n]` of n tokens, and
    the lengths of the `long` ones, which are few: they fill a million tokens each."""

    short: NDArray[np.int64]
    long: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path, of: Sequence[Shard]) -> Lengths:
        short, long = np.zeros(LONG, dtype=np.int64), [np.zeros(0, dtype=np.int64)]
        for shard in of:
            with opened_index(folder, shard) as index:
                for start in range(0, index.sequences, PIECE_DOCUMENTS):
                    lengths = index.lengths(start, min(start + PIECE_DOCUMENTS, index.sequences))
                    if lengths.min() < 1:
                        raise UserError(f"{folder / shard.name}.idx: a document of {lengths.min():,} tokens")
                    counts = np.bincount(lengths[lengths < LONG])
                    short[: len(counts)] += counts
                    long.append(lengths[lengths >= LONG])
        return cls(short, np.sort(np.concatenate(long)))

    def describe(self) -> dict[str, Any]:
        documents = int(self.short.sum()) + len(self.long)
        return {
            "min": self.at(1),
            "median": self.at((documents + 1) // 2),
            "max": self.at(documents),
            "percentiles": {str(p): self.at(max(1, -(-documents * p // 100))) for p in PERCENTILES},
        }

    def at(self, rank: int) -> int:
        """The length of document number `rank`, from 1, in the order of their lengths."""
        below = np.cumsum(self.short)
        if rank <= below[-1]:
            return int(np.searchsorted(below, rank))
        return int(self.long[rank - int(below[-1]) - 1])


# --- a page of a document --------------------------------------------------------------------------


def page(folder: Path, manifest: Manifest, split: str, number: int, of_pages: int) -> dict[str, Any]:
    """Page `of_pages`, from 1, of document `number`, from 0, of a split.

    Raises:
        UserError: there is no such document or page, or its index is damaged.
    """
    opened = shard_reader.open_split(folder, manifest, split)
    ends = np.cumsum([shard.documents for shard in opened.shards])
    if not 0 <= number < ends[-1]:
        raise UserError(f"no document {number:,}: {split} has {ends[-1]:,}, numbered from 0")
    at = int(np.searchsorted(ends, number, side="right"))
    shard = opened.shards[at]
    tokens = shard_reader.open_tokens(folder / f"{shard.name}.bin")
    in_shard = number - int(ends[at]) + shard.documents
    with opened_index(folder, shard) as index:
        length = int(index.lengths(in_shard, in_shard + 1)[0])
        start = (int(index.places(in_shard, in_shard + 1)[0]) - shard_format.HEADER_BYTES) // manifest.width.bytes
    if length < 1 or start < 0 or start + length > len(tokens):
        raise UserError(f"{folder / shard.name}.idx: document {in_shard:,} lies outside of the .bin")
    pages = -(-length // PAGE_TOKENS)
    if not 1 <= of_pages <= pages:
        raise UserError(f"no page {of_pages:,}: document {number:,} has {pages:,}, numbered from 1")
    vocabulary = save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    return {
        "split": split,
        "document": number,
        "shard": shard.name,
        "document_in_shard": in_shard,
        "first_token": start,
        "tokens": length,
        "page": of_pages,
        "pages": pages,
        "text": page_text(vocabulary, tokens[start : start + length], of_pages),
    }


def page_text(vocabulary: Tokenizer, document: Tokens, number: int) -> str:
    """The text of a page. A character that lies on two pages belongs to the second, so none is cut.

    Raises:
        UserError: an id that the tokenizer does not know.
    """
    first, stop = (number - 1) * PAGE_TOKENS, number * PAGE_TOKENS
    start = taken = max(0, first - AROUND)

    def ids() -> Iterator[int]:
        nonlocal taken
        for token in document[start : stop + AROUND].tolist():
            taken += 1
            yield token

    try:
        return "".join(text for text in interface.stream(vocabulary, ids()) if first < taken <= stop)
    except KeyError as error:
        raise UserError(
            f"tokenizer {vocabulary.name} has no id {error}: `python -m data_prep.verify` tells more"
        ) from None


def token_text(vocabulary: Tokenizer, *ids: int) -> str:
    """The text of ids, and of such as the tokenizer does not know a question mark."""
    try:
        return "".join(interface.stream(vocabulary, ids))
    except KeyError:
        return "?"


# --- how often ids occur ---------------------------------------------------------------------------


def histogram(folder: Path, manifest: Manifest, split: str | None, top: int) -> dict[str, Any]:
    """The most frequent ids of a split, or of all, with their text; and how many ids occur at all.

    Raises:
        UserError: no such split, a shard that is damaged, or an id outside of the vocabulary.
    """
    size = manifest.tokenizer["vocab_size"]
    counts = np.zeros(size, dtype=np.int64)
    vocabulary = save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    for path, tokens in _pieces(folder, manifest, [split] if split else manifest.splits):
        found = np.bincount(tokens)
        if len(found) > size:
            raise UserError(f"{path}: id {len(found) - 1:,} is outside of the tokenizer's {size:,} ids")
        counts[: len(found)] += found
    total = int(counts.sum())
    order = np.argsort(-counts, kind="stable")[:top]
    return {
        "split": split or "all",
        "tokens": total,
        "vocab_size": size,
        "ids_that_occur": int((counts > 0).sum()),
        "top": [
            {
                "id": int(token),
                "count": int(counts[token]),
                "share": int(counts[token]) / total,
                "text": token_text(vocabulary, int(token)),
            }
            for token in order
            if counts[token]
        ],
    }


def _pieces(folder: Path, manifest: Manifest, names: Sequence[str]) -> Iterator[tuple[Path, Tokens]]:
    of = [shard for name in names for shard in shard_reader.open_split(folder, manifest, name).shards]
    total = sum(shard.tokens for shard in of)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for shard in of:
            for _, tokens in chunked_file.of_shard(folder, shard, manifest.width):
                yield folder / f"{shard.name}.bin", tokens
                bar.update(len(tokens))


@contextmanager
def opened_index(folder: Path, shard: Shard) -> Iterator[Index]:
    """The index of a shard, which has as many documents as the manifest says."""
    with chunked_file.opened(folder / f"{shard.name}.idx") as file:
        index = Index(file)
        if index.sequences != shard.documents:
            raise UserError(
                f"{file.path}: {index.sequences:,} documents, the manifest says {shard.documents:,}; check all with "
                f"`python -m data_prep.verify {folder}`"
            )
        yield index


# --- as text ---------------------------------------------------------------------------------------


def _lines(found: dict[str, Any]) -> Iterator[str]:
    if "document" in found:
        yield from _page_lines(found["document"])
    if "histogram" in found:
        yield from _histogram_lines(found["histogram"])
    if "splits" in found:
        yield from _summary_lines(found)


def _summary_lines(found: dict[str, Any]) -> Iterator[str]:
    about = found["tokenizer"]
    yield f"{found['dir']}: complete (digest {found['digest'][:12]})"
    ids = f"{about['vocab_size']:,} ids as {found['dtype']}"
    yield f"tokenizer  {about['name']}, {ids}, end-of-text {about['end_of_text']}"
    if "special_tokens" in about:
        yield f"           special tokens: {about['special_tokens']}"
    for name, split in found["splits"].items():
        lengths = split["document_tokens"]
        yield (
            f"{name:9}  {split['tokens']:,} tokens in {split['documents']:,} documents, {split['shards']:,} shards; "
            f"{split['bytes_per_token']:.2f} bytes and {split['characters_per_token']:.2f} characters a token"
        )
        yield (
            f"           tokens a document: {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,}, "
            f"mean {lengths['mean']:,.1f}"
        )
        yield "           " + ", ".join(f"{p}% {n:,}" for p, n in lengths["percentiles"].items())
    names = [str(row["name"]) for row in found["inputs"]]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    size = sum(row["bytes"] for row in found["inputs"])
    yield f"inputs     {len(names):,} of {size / 1e6:,.1f} MB: {terminal.printable(', '.join(names[:3]))}{more}"
    yield f"split      {found['split_rule']}"
    changed = {key: found["counts"].get(key, 0) for key in (accounting.REPLACED, accounting.UNKNOWN)}
    left_out = [
        f"{count:,} {key.replace('_', ' ')}" for key, count in found["counts"].items() if count and key not in changed
    ]
    yield f"left out   {', '.join(left_out) or 'nothing'}"
    if any(changed.values()):
        yield f"changed    {accounting.changed(changed, sum(split['tokens'] for split in found['splits'].values()))}"
    if found["unread"]:
        yield f"not read   {unread.told(found['unread'])}"


def _page_lines(found: dict[str, Any]) -> Iterator[str]:
    first, last = found["first_token"], found["first_token"] + found["tokens"] - 1
    yield (
        f"document {found['document']:,} of {found['split']}: {found['shard']}, its document "
        f"{found['document_in_shard']:,}, tokens {first:,} to {last:,}; page {found['page']:,} of {found['pages']:,}"
    )
    yield terminal.shown(found["text"])


def _histogram_lines(found: dict[str, Any]) -> Iterator[str]:
    size, there = found["vocab_size"], found["ids_that_occur"]
    yield f"{found['tokens']:,} tokens; {there:,} of {size:,} ids occur ({there / size:.1%})"
    for row in found["top"]:
        yield f"{row['id']:>8}  {row['count']:>15,}  {row['share']:7.3%}  {terminal.printable(repr(row['text']))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description="What is in a folder of shards.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument("--document", type=int, metavar="K", help="show document K of a split, counted from 0")
    parser.add_argument("--page", type=int, default=1, metavar="N", help=f"its N-th {PAGE_TOKENS} tokens (default: 1)")
    parser.add_argument("--histogram", action="store_true", help="how often ids occur")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="ids that --histogram lists (default: 20)")
    parser.add_argument("--split", help="of --document (default: train), of --histogram (default: all)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


if __name__ == "__main__":
    cli.run(main)
