"""Show what is in a folder of shards: ``python -m data_prep.inspect DIR``.

Without options it prints what the manifest says, and how long the documents are. ``--document K`` shows the text of
one, page by page; ``--histogram`` shows how often each id occurs. Shards are read in chunks, so memory does not grow
with them: it holds a count for each id, and one for each length of a document up to a million tokens.
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
from hpcgpt.output.counted import counted
from hpcgpt.tokenizer import interface, save_load
from hpcgpt.tokenizer.interface import Tokenizer

PAGE_TOKENS = 512
AROUND = 64  # a page is decoded with this many tokens before and after it
CHUNK_DOCUMENTS = 1 << 20
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
LONG = 1 << 20  # the lengths of documents with at least this many tokens are listed, and not counted in a table


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    folder = Path(paths.expand(arguments.DIR, "DIR"))
    manifest = shard_format.read_manifest(folder)
    found: dict[str, Any] = {}
    if arguments.document is not None:
        found["document"] = page(folder, manifest, arguments.split or "train", arguments.document, arguments.page)
    if arguments.histogram:
        found["histogram"] = histogram(folder, manifest, arguments.split, arguments.top)
    if not found:
        found = summary(folder, manifest)
    print(json.dumps(found, ensure_ascii=False) if arguments.json else "\n".join(_lines(found)))
    return 0


# --- what is in it ---------------------------------------------------------------------------------


def summary(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Return what the manifest says, by split, and the lengths of the documents."""
    splits: dict[str, Any] = {}
    for name in manifest.splits:
        shards = [shard for shard in manifest.shards if shard.split == name]
        tokens, documents = sum(s.tokens for s in shards), sum(s.documents for s in shards)
        if not tokens or not documents:
            raise UserError(f"{folder}: its {name} shards are empty")
        characters, text_bytes = sum(s.characters for s in shards), sum(s.text_bytes for s in shards)
        splits[name] = {
            "shards": len(shards),
            "documents": documents,
            "tokens": tokens,
            "characters": characters,
            "text_bytes": text_bytes,
            "characters_per_token": characters / tokens,
            "bytes_per_token": text_bytes / tokens,
            "document_tokens": {"mean": tokens / documents} | LengthCounts.of(folder, shards).describe(),
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
class LengthCounts:
    """The lengths of documents in tokens, with end-of-text.

    `short[n]` documents have n tokens. `long` lists the lengths of the others: they are few, because each has at least
    LONG tokens.
    """

    short: NDArray[np.int64]
    long: NDArray[np.int64]

    @classmethod
    def of(cls, folder: Path, shards: Sequence[Shard]) -> LengthCounts:
        """Count the documents of these shards."""
        short, long = np.zeros(LONG, dtype=np.int64), [np.zeros(0, dtype=np.int64)]
        for shard in shards:
            with open_index(folder, shard) as index:
                for start in range(0, index.sequences, CHUNK_DOCUMENTS):
                    lengths = index.lengths(start, min(start + CHUNK_DOCUMENTS, index.sequences))
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
        """Return the length of the `rank`-th shortest document, from 1."""
        below = np.cumsum(self.short)
        if rank <= below[-1]:
            return int(np.searchsorted(below, rank))
        return int(self.long[rank - int(below[-1]) - 1])


# --- a page of a document --------------------------------------------------------------------------


def page(folder: Path, manifest: Manifest, split: str, number: int, page_number: int) -> dict[str, Any]:
    """Return page `page_number`, from 1, of document `number`, from 0, of a split.

    Raises:
        UserError: there is no such document or page, or the index is damaged.
    """
    opened = shard_reader.open_split(folder, manifest, split)
    ends = np.cumsum([shard.documents for shard in opened.shards])
    if not 0 <= number < ends[-1]:
        raise UserError(f"no document {number:,}: {split} has {ends[-1]:,}, numbered from 0")
    at = int(np.searchsorted(ends, number, side="right"))
    shard = opened.shards[at]
    tokens = shard_reader.open_tokens(folder / f"{shard.name}.bin")
    in_shard = number - int(ends[at]) + shard.documents
    with open_index(folder, shard) as index:
        length = int(index.lengths(in_shard, in_shard + 1)[0])
        start = (int(index.offsets(in_shard, in_shard + 1)[0]) - shard_format.HEADER_BYTES) // manifest.width.bytes
    if length < 1 or start < 0 or start + length > len(tokens):
        raise UserError(f"{folder / shard.name}.idx: document {in_shard:,} is outside of the .bin")
    pages = -(-length // PAGE_TOKENS)
    if not 1 <= page_number <= pages:
        raise UserError(f"no page {page_number:,}: document {number:,} has {pages:,}, numbered from 1")
    tokenizer = save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    return {
        "split": split,
        "document": number,
        "shard": shard.name,
        "document_in_shard": in_shard,
        "first_token": start,
        "tokens": length,
        "page": page_number,
        "pages": pages,
        "text": page_text(tokenizer, tokens[start : start + length], page_number),
    }


def page_text(tokenizer: Tokenizer, document: Tokens, number: int) -> str:
    """Return the text of a page. A character with tokens on two pages is shown on the second.

    Raises:
        UserError: the tokenizer has no such id.
    """
    first, stop = (number - 1) * PAGE_TOKENS, number * PAGE_TOKENS
    start = consumed = max(0, first - AROUND)

    def ids() -> Iterator[int]:
        nonlocal consumed
        for token in document[start : stop + AROUND].tolist():
            consumed += 1
            yield token

    try:
        return "".join(text for text in interface.stream(tokenizer, ids()) if first < consumed <= stop)
    except KeyError as error:
        raise UserError(f"tokenizer {tokenizer.name} has no id {error}: see `python -m data_prep.verify`") from None


def token_text(tokenizer: Tokenizer, *ids: int) -> str:
    """Return the text of ids; "?" if the tokenizer lacks one of them."""
    try:
        return "".join(interface.stream(tokenizer, ids, unfinished="\ufffd"))
    except KeyError:
        return "?"


# --- how often ids occur ---------------------------------------------------------------------------


def histogram(folder: Path, manifest: Manifest, split: str | None, top: int) -> dict[str, Any]:
    """Return the most frequent ids of one or all splits, with their text, and how many ids occur at all.

    Raises:
        UserError: there is no such split, a shard is damaged, or an id is outside of the vocabulary.
    """
    size = manifest.tokenizer["vocab_size"]
    counts = np.zeros(size, dtype=np.int64)
    tokenizer = save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    for path, tokens in _token_chunks(folder, manifest, [split] if split else manifest.splits):
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= size:  # bincount would make a table up to it
            raise UserError(f"{path}: id {largest:,} is outside of the tokenizer's {size:,} ids")
        counts += np.bincount(tokens, minlength=size)
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
                "text": token_text(tokenizer, int(token)),
            }
            for token in order
            if counts[token]
        ],
    }


def _token_chunks(folder: Path, manifest: Manifest, names: Sequence[str]) -> Iterator[tuple[Path, Tokens]]:
    """Yield the tokens of these splits in chunks, each with the path of its file."""
    shards = [shard for name in names for shard in shard_reader.open_split(folder, manifest, name).shards]
    total = sum(shard.tokens for shard in shards)
    with tqdm(total=total, unit="tok", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for shard in shards:
            for _, tokens in chunked_file.shard_chunks(folder, shard, manifest.width):
                yield folder / f"{shard.name}.bin", tokens
                bar.update(len(tokens))


@contextmanager
def open_index(folder: Path, shard: Shard) -> Iterator[Index]:
    """Open the index of a shard, and check that it has as many documents as the manifest says."""
    with chunked_file.open_file(folder / f"{shard.name}.idx") as file:
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
            f"{name:9}  {split['tokens']:,} tokens in {counted(split['documents'], 'document')}, "
            f"{counted(split['shards'], 'shard')}; "
            f"{split['bytes_per_token']:.2f} bytes and {split['characters_per_token']:.2f} characters per token"
        )
        yield (
            f"           tokens per document: {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,}, "
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
        yield f"not read   {unread.summarize(found['unread'])}"


def _page_lines(found: dict[str, Any]) -> Iterator[str]:
    first, last = found["first_token"], found["first_token"] + found["tokens"] - 1
    yield (
        f"document {found['document']:,} of {found['split']}: {found['shard']}, its document "
        f"{found['document_in_shard']:,}, tokens {first:,} to {last:,}; page {found['page']:,} of {found['pages']:,}"
    )
    yield terminal.shown(found["text"])


def _histogram_lines(found: dict[str, Any]) -> Iterator[str]:
    size, occurring = found["vocab_size"], found["ids_that_occur"]
    yield f"{found['tokens']:,} tokens; {occurring:,} of {size:,} ids occur ({occurring / size:.1%})"
    for row in found["top"]:
        yield f"{row['id']:>8}  {row['count']:>15,}  {row['share']:7.3%}  {terminal.printable(repr(row['text']))}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description="What is in a folder of shards.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument("--document", type=int, metavar="K", help="show document K of a split, counted from 0")
    parser.add_argument(
        "--page", type=int, default=1, metavar="N", help=f"show its N-th {PAGE_TOKENS} tokens (default: 1)"
    )
    parser.add_argument("--histogram", action="store_true", help="show how often ids occur")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="ids that --histogram lists (default: 20)")
    parser.add_argument("--split", help="of --document (default: train), of --histogram (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    cli.run(main)
