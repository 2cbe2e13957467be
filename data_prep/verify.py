"""``python -m data_prep.verify DIR``: are these shards whole, and what their manifest says?

Checks the manifest's digest, the tokenizer's fingerprint, and of every shard its size, checksums, header,
index, document starts and ids. With ``--quick`` only what can be told without reading the tokens: that
nothing is missing, truncated or of another kind. Exit status 0 if all holds, 1 if not, 2 if there is no data set.

Each thread reads one shard at a time, in pieces, and looks at a piece while it is in the cache: one pass over
the disk, and memory of a few pieces a thread at any size. (Checksums and numpy let go of the interpreter,
so threads are as good as processes here.)
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from time import monotonic

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.token_files import chunked_file
from data_prep.token_files.chunked_file import File
from data_prep.token_files.megatron_index import Index
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import HEADER_BYTES, Manifest, Shard, Width
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import save_load

PIECE_TOKENS = 1 << 20
PIECE_DOCUMENTS = 1 << 16


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
        raise UserError(f"--workers {options.workers}: expected 1 or more")
    folder = Path(paths.expand(options.DIR, "DIR"))
    manifest = shard_format.read_manifest(folder)
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
    if beside := strangers(folder, manifest):
        print(f"not checked, for the manifest does not name them: {', '.join(beside)}")
    return 0


def strangers(folder: Path, manifest: Manifest) -> list[str]:
    """Token files in the folder that are no part of the data set, as an import or a copy over it leaves them."""
    known = {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".bin", ".idx")}
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx") and path.name not in known)


def verify(folder: Path, manifest: Manifest, workers: int = 1, quick: bool = False) -> list[str]:
    """Every problem of a data set, one sentence each, in the order of its shards."""
    found: list[str] = []
    try:
        save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    except ValueError as error:
        found.append(str(error))
    total = 0 if quick else sum(shard.tokens for shard in manifest.shards) * manifest.width.bytes
    lock, leave = Lock(), Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=quick or not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def read(count: int) -> None:
            if leave.is_set():
                raise UserError("interrupted")
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
            chunked_file.opened(folder / f"{shard.name}.bin") as bin_file,
            chunked_file.opened(folder / f"{shard.name}.idx") as idx_file,
        ):
            if quick:
                chunked_file.check_header(bin_file, shard, manifest.width)
                _check_head(idx_file, shard, manifest.width)
                return []
            return _of_content(bin_file, idx_file, shard, manifest, read)
    except (ValueError, OSError) as error:
        return [str(error)]


def _of_content(
    bin_file: File, idx_file: File, shard: Shard, manifest: Manifest, read: Callable[[int], None]
) -> list[str]:
    """One pass over both files. Of a file that fails its checksum nothing else is told."""
    width, end_of_text, size = manifest.width, manifest.tokenizer["end_of_text"], manifest.tokenizer["vocab_size"]
    damaged = "its checksum differs from the manifest's: the file was changed or damaged"
    found = []
    starts = _Starts(idx_file, shard, width)
    checksum, low, high, unmarked = xxhash.xxh3_128(), width.most_ids, -1, False
    checksum.update(bin_file.read("|u1", 0, HEADER_BYTES).data)
    count = (bin_file.bytes - HEADER_BYTES) // width.bytes
    for first, tokens in bin_file.pieces(width.dtype, HEADER_BYTES, count, PIECE_TOKENS):
        checksum.update(tokens.data)
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        unmarked |= bool((tokens[starts.within(first, first + len(tokens))] != end_of_text).any())
        read(tokens.nbytes)
    if checksum.hexdigest() != shard.xxh3:
        return [f"{bin_file.path}: {damaged}"]
    chunked_file.check_header(bin_file, shard, width)
    if _checksum(idx_file) != shard.idx_xxh3:
        return [f"{idx_file.path}: {damaged}"]
    if not starts.complete():
        found.append(f"{idx_file.path}: its documents do not add up to the {shard.tokens:,} tokens of the .bin")
    elif unmarked:
        found.append(f"{bin_file.path}: a document does not start with the end-of-text id {end_of_text}")
    if (low, high) != (shard.min_id, shard.max_id):
        found.append(f"{bin_file.path}: ids {low} to {high}, the manifest says {shard.min_id} to {shard.max_id}")
    if high >= size:
        found.append(f"{bin_file.path}: id {high} is outside of the tokenizer's {size:,} ids")
    return found


class _Starts:
    """Where the documents of a shard start, in tokens, told range after range; ends early where the index is wrong."""

    def __init__(self, idx_file: File, shard: Shard, width: Width) -> None:
        self._pieces = _starts(idx_file, shard, width)
        self._held = np.zeros(0, dtype=np.int64)
        self._wrong = False

    def within(self, first: int, stop: int) -> NDArray[np.int64]:
        """Those of tokens first ... stop - 1, counted from `first`."""
        parts = []
        while True:
            count = int(np.searchsorted(self._held, stop))
            parts.append(self._held[:count] - first)
            self._held = self._held[count:]
            if len(self._held) or (more := self._next()) is None:
                return np.concatenate(parts)
            self._held = more

    def complete(self) -> bool:
        """Has the index told of all documents, and nothing wrong?"""
        return not len(self._held) and self._next() is None and not self._wrong

    def _next(self) -> NDArray[np.int64] | None:
        try:
            return next(self._pieces, None)
        except ValueError:
            self._wrong = True
            return None


def _starts(idx_file: File, shard: Shard, width: Width) -> Iterator[NDArray[np.int64]]:
    """Raises UserError where the index is not exactly what `shard_format.index` writes for these documents."""
    index, at = _check_head(idx_file, shard, width), 0
    for first in range(0, shard.documents, PIECE_DOCUMENTS):
        stop = min(first + PIECE_DOCUMENTS, shard.documents)
        lengths = index.lengths(first, stop)
        starts = at + np.cumsum(lengths) - lengths
        if (
            (lengths < 1).any()
            or not np.array_equal(index.places(first, stop), HEADER_BYTES + width.bytes * starts)
            or not np.array_equal(index.borders(first, stop), np.arange(first, stop))
        ):
            raise UserError(f"{idx_file.path}: documents {first:,} to {stop - 1:,} are not one behind the other")
        yield starts
        at += int(lengths.sum())
    if at != shard.tokens or index.borders(shard.documents, shard.documents + 1)[0] != shard.documents:
        raise UserError(f"{idx_file.path}: the documents end at token {at:,}")


def _check_head(idx_file: File, shard: Shard, width: Width) -> Index:
    index = Index(idx_file)
    if (index.code, index.sequences, index.documents) != (width.idx_code, shard.documents, shard.documents):
        raise UserError(
            f"{idx_file.path}: {index.documents:,} documents of {index.sequences:,} sequences with code {index.code}, "
            f"the manifest says {shard.documents:,} with code {width.idx_code}"
        )
    return index


def _checksum(file: File) -> str:
    checksum = xxhash.xxh3_128()
    for _, content in file.pieces("|u1", 0, file.bytes, PIECE_TOKENS):
        checksum.update(content.data)
    return checksum.hexdigest()


if __name__ == "__main__":
    cli.run(main)
