"""``python -m data_prep.verify DIR``: are these shards whole, and what their manifest says?

Checks the manifest's digest, the tokenizer's fingerprint, and of every shard its size, checksums, header,
index, document starts and ids. With ``--quick`` only what can be told without reading the tokens: that
nothing is missing, truncated or of another kind. Exit status 0 if all holds, 1 if not, 2 if there is no data set.

Each thread reads one file at a time, in pieces, and looks at a piece while it is in the cache: one pass over
the disk, and memory of a few pieces a thread at any size. (Checksums and numpy let go of the interpreter,
so threads are as good as processes here.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from time import monotonic

import numpy as np
import xxhash
from tqdm import tqdm

from data_prep import megatron_index
from data_prep.megatron_index import File, Index
from hpcgpt import cli, shard_reader, shards, tokenizer
from hpcgpt.shards import HEADER_BYTES, Manifest, Shard

PIECE_BYTES = 8 << 20
PIECE_DOCUMENTS = 1 << 18


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check a folder of shards.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="files to read at a time (default: the cores of this machine)",
    )
    parser.add_argument("--quick", action="store_true", help="sizes and headers only, and no token")
    options = parser.parse_args(argv)
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: expected 1 or more")
    folder = Path(options.DIR)
    manifest = shards.read_manifest(folder)
    started_at = monotonic()
    found = verify(folder, manifest, options.workers, options.quick)
    elapsed_s = monotonic() - started_at
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        return 1
    tokens, size = (sum(values) for values in zip(*((s.tokens, s.bytes) for s in manifest.shards), strict=True))
    what = "sizes and headers" if options.quick else "all"
    # What takes less than a second is not read from a disk, and no rate at all.
    rate = "" if options.quick or elapsed_s < 1 else f" ({size / 1e6:,.0f} MB, {size / 1e6 / elapsed_s:,.0f} MB/s)"
    print(f"{folder}: {len(manifest.shards):,} shards, {tokens:,} tokens, {what} as the manifest says{rate}")
    return 0


def verify(folder: Path, manifest: Manifest, workers: int = 1, quick: bool = False) -> list[str]:
    """Every problem of a data set, one sentence each, in the order of its shards."""
    found: list[str] = []
    try:
        tokenizer.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    except ValueError as error:
        found.append(str(error))
    total = 0 if quick else sum(shard.bytes for shard in manifest.shards)
    lock, leave = Lock(), Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=quick or not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def read(count: int) -> None:
            if leave.is_set():
                raise ValueError("interrupted")
            with lock:
                bar.update(count)

        def check(shard: Shard) -> list[str]:
            return problems(folder, shard, manifest, quick, read)

        try:
            for of_shard in pool.map(check, manifest.shards):
                found += of_shard
        except BaseException:
            leave.set()
            pool.shutdown(cancel_futures=True)
            raise
    return found


def problems(folder: Path, shard: Shard, manifest: Manifest, quick: bool, read: Callable[[int], None]) -> list[str]:
    """Everything that is wrong with one shard. `read` is told of the bytes of the .bin as they are read."""
    try:
        shard_reader.check_size(folder, shard)
        with (
            megatron_index.opened(folder / f"{shard.name}.bin") as bin_file,
            megatron_index.opened(folder / f"{shard.name}.idx") as idx_file,
        ):
            if quick:
                _check_header(bin_file, shard, manifest)
                _check_head(Index(idx_file), shard, manifest, idx_file.path)
                return []
            seen = _read_tokens(bin_file, manifest, read)
            if seen.xxh3 != shard.xxh3:
                return [f"{bin_file.path}: its checksum differs from the manifest's: the file was changed or damaged"]
            _check_header(bin_file, shard, manifest)
            if _checksum(idx_file) != shard.idx_xxh3:
                return [f"{idx_file.path}: its checksum differs from the manifest's: the file was changed or damaged"]
            return [*_of_index(bin_file, idx_file, shard, manifest), *_of_ids(bin_file.path, seen, shard, manifest)]
    except (ValueError, OSError) as error:
        return [str(error)]


@dataclass(frozen=True)
class _Seen:
    """What one pass over a .bin tells."""

    xxh3: str
    low: int
    high: int


def _read_tokens(file: File, manifest: Manifest, read: Callable[[int], None]) -> _Seen:
    checksum, low, high = xxhash.xxh3_128(), manifest.width.most_ids, -1
    header = file.read("|u1", 0, HEADER_BYTES)
    checksum.update(header.data)
    read(HEADER_BYTES)
    for tokens in _pieces(file, manifest):
        checksum.update(tokens.data)
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        read(tokens.nbytes)
    return _Seen(checksum.hexdigest(), low, high)


def _pieces(file: File, manifest: Manifest) -> Iterator[shards.Tokens]:
    size = manifest.width.bytes
    for place in range(HEADER_BYTES, file.bytes, PIECE_BYTES):
        yield file.read(manifest.width.dtype, place, min(PIECE_BYTES, file.bytes - place) // size)


def _checksum(file: File) -> str:
    checksum = xxhash.xxh3_128()
    for place in range(0, file.bytes, PIECE_BYTES):
        checksum.update(file.read("|u1", place, min(PIECE_BYTES, file.bytes - place)).data)
    return checksum.hexdigest()


def _check_header(file: File, shard: Shard, manifest: Manifest) -> None:
    tokens = shard_reader.open_tokens(file.path)
    if tokens.dtype != np.dtype(manifest.width.dtype):
        raise ValueError(f"{file.path}: its header says {tokens.dtype}, the manifest says {manifest.dtype}")
    if len(tokens) != shard.tokens:
        raise ValueError(f"{file.path}: its header says {len(tokens):,} tokens, the manifest says {shard.tokens:,}")


def _check_head(index: Index, shard: Shard, manifest: Manifest, path: Path) -> None:
    if (index.code, index.sequences, index.documents) != (manifest.width.idx_code, shard.documents, shard.documents):
        raise ValueError(
            f"{path}: {index.documents:,} documents of {index.sequences:,} sequences with code {index.code}, "
            f"the manifest says {shard.documents:,} with code {manifest.width.idx_code}"
        )


def _of_index(bin_file: File, idx_file: File, shard: Shard, manifest: Manifest) -> list[str]:
    """Is the index one of our own, of these tokens, and does each document start with end-of-text?"""
    wrong = f"{idx_file.path}: its documents do not add up to the {shard.tokens:,} tokens of the .bin"
    try:
        index = Index(idx_file)
        _check_head(index, shard, manifest, idx_file.path)
    except ValueError:
        return [wrong]
    tokens, end_of_text = shard_reader.open_tokens(bin_file.path), manifest.tokenizer["end_of_text"]
    at = 0
    for first in range(0, shard.documents, PIECE_DOCUMENTS):
        stop = min(first + PIECE_DOCUMENTS, shard.documents)
        lengths = index.lengths(first, stop)
        ends = at + np.cumsum(lengths)
        starts = ends - lengths
        in_order = (lengths > 0).all() and ends[-1] <= shard.tokens
        placed = np.array_equal(index.places(first, stop), HEADER_BYTES + manifest.width.bytes * starts)
        if not in_order or not placed or not np.array_equal(index.borders(first, stop), np.arange(first, stop)):
            return [wrong]
        if not (tokens[starts] == end_of_text).all():
            return [f"{bin_file.path}: a document does not start with the end-of-text id {end_of_text}"]
        at = int(ends[-1])
    last = index.borders(shard.documents, shard.documents + 1)
    return [] if at == shard.tokens and last[0] == shard.documents else [wrong]


def _of_ids(path: Path, seen: _Seen, shard: Shard, manifest: Manifest) -> list[str]:
    found, size = [], manifest.tokenizer["vocab_size"]
    if (seen.low, seen.high) != (shard.min_id, shard.max_id):
        found.append(f"{path}: ids {seen.low} to {seen.high}, the manifest says {shard.min_id} to {shard.max_id}")
    if seen.high >= size:
        found.append(f"{path}: id {seen.high} is outside of the tokenizer's {size:,} ids")
    return found


if __name__ == "__main__":
    cli.run(main)
