"""Compare shards with their manifest: ``python -m data_prep.verify DIR``.

The command checks the manifest's digest, the tokenizer's fingerprint, and each shard's size, checksums, header, index,
document starts and ids. With ``--quick`` it reads no tokens, and only finds what is missing, truncated or has another
header. Exit status: 0 if everything matches, 1 if not, 2 if there is no data set.

Each thread reads one shard at a time, in chunks, and does all checks on a chunk while it is in the CPU's cache. So
every file is read once, and a thread needs memory for a few chunks only. (Threads are as fast as processes here,
because checksums and numpy release the GIL.)
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
from data_prep.token_files.chunked_file import ChunkedFile
from data_prep.token_files.megatron_index import Index
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import HEADER_BYTES, Manifest, Shard, Width
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.tokenizer import save_load

CHUNK_TOKENS = 1 << 20
CHUNK_DOCUMENTS = 1 << 16


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check a folder of shards.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of shards to read at a time (default: the cores of this machine)",
    )
    parser.add_argument("--quick", action="store_true", help="check only sizes and headers, without reading tokens")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: expected 1 or more")
    folder = Path(paths.expand(arguments.DIR, "DIR"))
    manifest = shard_format.read_manifest(folder)
    started_at = monotonic()
    problems = verify(folder, manifest, arguments.workers, arguments.quick)
    elapsed_s = monotonic() - started_at
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        return 1
    tokens, size = (sum(values) for values in zip(*((s.tokens, s.bytes) for s in manifest.shards), strict=True))
    what = "sizes and headers" if arguments.quick else "all"
    # In less than a second it was not read from a disk, so a rate would mean nothing.
    rate = "" if arguments.quick or elapsed_s < 1 else f" ({size / 1e6:,.0f} MB, {size / 1e6 / elapsed_s:,.0f} MB/s)"
    print(f"{folder}: {counted(len(manifest.shards), 'shard')}, {tokens:,} tokens, {what} as the manifest says{rate}")
    if unlisted := unlisted_files(folder, manifest):
        print(f"not checked, because the manifest does not list them: {', '.join(unlisted)}")
    return 0


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Return the token files in the folder that are not part of the data set; a copy into the folder may leave some."""
    known = {f"{shard.name}{suffix}" for shard in manifest.shards for suffix in (".bin", ".idx")}
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".idx") and path.name not in known)


def verify(folder: Path, manifest: Manifest, workers: int = 1, quick: bool = False) -> list[str]:
    """Return every problem of a data set, one sentence each, in the order of its shards."""
    problems: list[str] = []
    try:
        save_load.load(folder / "tokenizer", manifest.tokenizer["fingerprint"])
    except ValueError as error:
        problems.append(str(error))
    total = 0 if quick else sum(shard.tokens for shard in manifest.shards) * manifest.width.bytes
    lock, interrupted = Lock(), Event()
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=quick or not sys.stderr.isatty()) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):

        def report(count: int) -> None:
            if interrupted.is_set():
                raise UserError("interrupted")
            with lock:
                bar.update(count)

        def check(shard: Shard) -> list[str]:
            return shard_problems(folder, shard, manifest, quick, report)

        try:
            for of_shard in pool.map(check, manifest.shards):
                problems += of_shard
        except BaseException:
            interrupted.set()
            pool.shutdown(cancel_futures=True)
            raise
    return problems


def shard_problems(
    folder: Path, shard: Shard, manifest: Manifest, quick: bool, report: Callable[[int], None]
) -> list[str]:
    """Return every problem of one shard. `report` is called with the number of bytes of each chunk that was read."""
    try:
        shard_reader.check_size(folder, shard)
        with (
            chunked_file.open_file(folder / f"{shard.name}.bin") as bin_file,
            chunked_file.open_file(folder / f"{shard.name}.idx") as idx_file,
        ):
            if quick:
                chunked_file.check_header(bin_file, shard, manifest.width)
                _check_head(idx_file, shard, manifest.width)
                return []
            return _content_problems(bin_file, idx_file, shard, manifest, report)
    except (ValueError, OSError) as error:
        return [str(error)]


def _content_problems(
    bin_file: ChunkedFile, idx_file: ChunkedFile, shard: Shard, manifest: Manifest, report: Callable[[int], None]
) -> list[str]:
    """Read both files once, and return their problems. If a checksum differs, that is the only problem."""
    width, end_of_text, size = manifest.width, manifest.tokenizer["end_of_text"], manifest.tokenizer["vocab_size"]
    damaged = "its checksum differs from the manifest's: the file was changed or damaged"
    problems = []
    starts = _DocumentStarts(idx_file, shard, width)
    checksum, low, high, lacks_eot = xxhash.xxh3_128(), width.most_ids, -1, False
    checksum.update(bin_file.read("|u1", 0, HEADER_BYTES).data)
    count = (bin_file.bytes - HEADER_BYTES) // width.bytes
    for first, tokens in bin_file.chunks(width.dtype, HEADER_BYTES, count, CHUNK_TOKENS):
        checksum.update(tokens.data)
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        lacks_eot |= bool((tokens[starts.within(first, first + len(tokens))] != end_of_text).any())
        report(tokens.nbytes)
    if checksum.hexdigest() != shard.xxh3:
        return [f"{bin_file.path}: {damaged}"]
    chunked_file.check_header(bin_file, shard, width)
    if _checksum(idx_file) != shard.idx_xxh3:
        return [f"{idx_file.path}: {damaged}"]
    if not starts.complete():
        problems.append(f"{idx_file.path}: its documents do not add up to the {shard.tokens:,} tokens of the .bin")
    elif lacks_eot:
        problems.append(f"{bin_file.path}: a document does not start with the end-of-text id {end_of_text}")
    if (low, high) != (shard.min_id, shard.max_id):
        problems.append(f"{bin_file.path}: ids {low} to {high}, the manifest says {shard.min_id} to {shard.max_id}")
    if high >= size:
        problems.append(f"{bin_file.path}: id {high} is outside of the tokenizer's {size:,} ids")
    return problems


class _DocumentStarts:
    """Where the documents of a shard start, in tokens, read from its index range by range, until an error in it."""

    def __init__(self, idx_file: ChunkedFile, shard: Shard, width: Width) -> None:
        self._chunks = _document_starts(idx_file, shard, width)
        self._unused = np.zeros(0, dtype=np.int64)
        self._has_error = False

    def within(self, first: int, stop: int) -> NDArray[np.int64]:
        """Return the starts among tokens first ... stop - 1, relative to `first`."""
        parts = []
        while True:
            count = int(np.searchsorted(self._unused, stop))
            parts.append(self._unused[:count] - first)
            self._unused = self._unused[count:]
            if len(self._unused) or (more := self._next()) is None:
                return np.concatenate(parts)
            self._unused = more

    def complete(self) -> bool:
        """Return whether the index has been used up, without an error in it."""
        return not len(self._unused) and self._next() is None and not self._has_error

    def _next(self) -> NDArray[np.int64] | None:
        try:
            return next(self._chunks, None)
        except ValueError:
            self._has_error = True
            return None


def _document_starts(idx_file: ChunkedFile, shard: Shard, width: Width) -> Iterator[NDArray[np.int64]]:
    """Yield the starts of all documents in chunks.

    Raises:
        UserError: the index is not what `shard_format.index` writes for such documents.
    """
    index, at = _check_head(idx_file, shard, width), 0
    for first in range(0, shard.documents, CHUNK_DOCUMENTS):
        stop = min(first + CHUNK_DOCUMENTS, shard.documents)
        lengths = index.lengths(first, stop)
        starts = at + np.cumsum(lengths) - lengths
        if (
            (lengths < 1).any()
            or not np.array_equal(index.offsets(first, stop), HEADER_BYTES + width.bytes * starts)
            or not np.array_equal(index.borders(first, stop), np.arange(first, stop))
        ):
            raise UserError(f"{idx_file.path}: documents {first:,} to {stop - 1:,} are not contiguous")
        yield starts
        at += int(lengths.sum())
    if at != shard.tokens or index.borders(shard.documents, shard.documents + 1)[0] != shard.documents:
        raise UserError(f"{idx_file.path}: the documents end at token {at:,}")


def _check_head(idx_file: ChunkedFile, shard: Shard, width: Width) -> Index:
    index = Index(idx_file)
    if (index.code, index.sequences, index.documents) != (width.idx_code, shard.documents, shard.documents):
        raise UserError(
            f"{idx_file.path}: {index.documents:,} documents of {index.sequences:,} sequences with code {index.code}, "
            f"the manifest says {shard.documents:,} with code {width.idx_code}"
        )
    return index


def _checksum(file: ChunkedFile) -> str:
    checksum = xxhash.xxh3_128()
    for _, content in file.chunks("|u1", 0, file.bytes, CHUNK_TOKENS):
        checksum.update(content.data)
    return checksum.hexdigest()


if __name__ == "__main__":
    cli.run(main)
