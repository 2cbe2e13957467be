"""Read token files of other programs (nanoGPT, llm.c, Megatron) as a stream of chunks.

**nanogpt**: only little-endian uint16 tokens. **llmc**, also modded-nanogpt: a header, then uint16 or uint32 tokens
(see ``hpcgpt.data.shard_format``). In both, only end-of-text ids separate documents, and a document may continue in the
next file, because llm.c ends a shard anywhere. **megatron**: NAME.bin, and NAME.idx, which says where documents begin;
each document is in one file.

The files are not trusted: every number is checked. They are not memory-mapped, and at most a few megabytes are in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.token_files import chunked_file
from data_prep.token_files.chunked_file import ChunkedFile
from data_prep.token_files.megatron_index import Index, IndexedDocuments
from hpcgpt.data import shard_format
from hpcgpt.errors import UserError

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of a file or of its documents, from number `first` on.

    `document_starts` are the indices in `tokens` (n,) at which the file's index says that a document begins. n means
    that one begins with the next chunk.
    """

    path: Path
    first: int
    tokens: NDArray[Any]
    document_starts: NDArray[np.int64]


Reader = Callable[[Path], Iterator[TokenChunk]]
_NPY = b"\x93NUMPY"
NO_STARTS = np.zeros(0, dtype=np.int64)


def nanogpt(path: Path) -> Iterator[TokenChunk]:
    """Read a file of nanoGPT.

    Raises:
        UserError: nanoGPT did not write it.
    """
    with chunked_file.open_file(path) as file:
        _refuse_npy(file)
        if file.bytes % 2 or not file.bytes:
            raise UserError(f"{path}: {file.bytes:,} bytes, expected a number of uint16 tokens and nothing else")
        if file.bytes >= shard_format.HEADER_BYTES and _width(file) is not None:
            raise UserError(f"{path} has llm.c's header, and nanoGPT's files have none: use --from llmc")
        yield from _chunks(file, "<u2", 0, file.bytes // 2)


def llmc(path: Path) -> Iterator[TokenChunk]:
    """Read a file of llm.c or modded-nanogpt.

    Raises:
        UserError: these programs would not read it.
    """
    with chunked_file.open_file(path) as file:
        _refuse_npy(file)
        width = _width(file) if file.bytes >= shard_format.HEADER_BYTES else None
        if width is None:
            known = " or ".join(f"{w.magic}, {w.version} ({w.name})" for w in shard_format.WIDTHS.values())
            raise UserError(
                f"{path} has no header of llm.c, {known}; a file without a header may be nanoGPT's: --from nanogpt"
            )
        count = int(file.read("<i4", 8, 1)[0])
        if count < 1 or file.bytes != shard_format.HEADER_BYTES + width.bytes * count:
            raise UserError(f"{path}: {file.bytes:,} bytes do not fit the {count:,} {width.name} tokens of its header")
        yield from _chunks(file, width.dtype, shard_format.HEADER_BYTES, count)


def megatron(path: Path) -> Iterator[TokenChunk]:
    """Read a .bin and the .idx beside it.

    Raises:
        UserError: the two do not match.
    """
    with chunked_file.open_file(path) as file, chunked_file.open_file(path.with_suffix(".idx")) as idx_file:
        index = Index(idx_file)
        if np.dtype(index.dtype).kind == "f":
            raise UserError(f"{idx_file.path}: its tokens are floating-point numbers, code {index.code}")
        first = 0
        for documents in index.chunks(file.bytes):
            ends = np.concatenate([[0], np.cumsum(documents.lengths)])
            begins = ends[documents.starts[:-1]]
            for start, stop, tokens in _sequences(file, index.dtype, documents):
                # A start at the end of a chunk belongs to that chunk, so that an empty last document is counted.
                here = slice(*np.searchsorted(begins, [start or -1, stop], side="right"))
                yield TokenChunk(path, first + start, tokens, begins[here] - start)
            first += int(ends[-1])


def uncovered(path: Path) -> tuple[int, int]:
    """Return how many bytes of a .bin no document of its .idx covers, without the header of hpcgpt's shards; its size.

    Raises:
        UserError: the two do not match, or documents overlap.
    """
    with chunked_file.open_file(path) as file, chunked_file.open_file(path.with_suffix(".idx")) as idx_file:
        has_header = file.bytes >= shard_format.HEADER_BYTES and _width(file) is not None
        return Index(idx_file).uncovered(file.bytes, shard_format.HEADER_BYTES if has_header else 0), file.bytes


READERS: dict[str, Reader] = {"nanogpt": nanogpt, "llmc": llmc, "megatron": megatron}


def _refuse_npy(file: ChunkedFile) -> None:
    if file.bytes >= len(_NPY) and file.read("|u1", 0, len(_NPY)).tobytes() == _NPY:
        raise UserError(
            f"{file.path} is NumPy's .npy file, with a header before its numbers: write only the tokens, with "
            "`numpy.load(FILE).astype('uint16').tofile('train.bin')`"
        )


def _width(file: ChunkedFile) -> shard_format.Width | None:
    magic, version = file.read("<i4", 0, 2).tolist()
    return next((w for w in shard_format.WIDTHS.values() if (w.magic, w.version) == (magic, version)), None)


def _chunks(file: ChunkedFile, dtype: str, offset: int, count: int) -> Iterator[TokenChunk]:
    for first, tokens in file.chunks(dtype, offset, count, CHUNK_TOKENS):
        yield TokenChunk(file.path, first, tokens, NO_STARTS)


def _sequences(file: ChunkedFile, dtype: str, documents: IndexedDocuments) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Yield the tokens of all sequences in chunks, each with its start and stop among these tokens.

    Sequences that are adjacent in the .bin, as Megatron writes them, are read together.
    """
    size = np.dtype(dtype).itemsize
    lengths, offsets = documents.lengths, documents.offsets
    apart = np.flatnonzero(offsets[1:] != offsets[:-1] + lengths[:-1] * size) + 1
    start = 0
    for run in np.split(np.arange(len(lengths)), apart):
        count = int(lengths[run].sum())
        for _, tokens in file.chunks(dtype, int(offsets[run[0]]), count, CHUNK_TOKENS):
            yield start, start + len(tokens), tokens
            start += len(tokens)
