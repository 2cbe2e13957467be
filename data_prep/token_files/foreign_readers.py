"""Token files of other programs, as one stream of pieces: nanoGPT's, llm.c's and Megatron's.

**nanogpt**: nothing but little-endian uint16 tokens. **llmc**, also modded-nanogpt's: a header, then uint16
or uint32 tokens (see ``hpcgpt.data.shard_format``). In both, documents are told apart by the end-of-text id alone,
and may go on in the next file: llm.c cuts its shards anywhere. **megatron**: NAME.bin with NAME.idx beside
it, which tells where documents begin; they never go on in the next file.

Nothing in these files is believed, nothing is mapped, and at most a few megabytes are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.token_files import chunked_file
from data_prep.token_files.chunked_file import File
from data_prep.token_files.megatron_index import Documents, Index
from hpcgpt.data import shard_format
from hpcgpt.errors import UserError

PIECE_TOKENS = 1 << 20


@dataclass(frozen=True)
class Piece:
    """Tokens `first` ... of a file, or of its documents one after the other. `cuts` are the places in `tokens` (n,)
    where a document is known to begin (n: the next one does), besides those that end-of-text ids tell of."""

    path: Path
    first: int
    tokens: NDArray[Any]
    cuts: NDArray[np.int64]


Reader = Callable[[Path], Iterator[Piece]]
_NPY = b"\x93NUMPY"
NO_CUTS = np.zeros(0, dtype=np.int64)


def nanogpt(path: Path) -> Iterator[Piece]:
    """Raises UserError for a file that nanoGPT did not write."""
    with chunked_file.opened(path) as file:
        _refuse_npy(file)
        if file.bytes % 2 or not file.bytes:
            raise UserError(f"{path}: {file.bytes:,} bytes, expected a number of uint16 tokens and nothing else")
        if file.bytes >= shard_format.HEADER_BYTES and _width(file) is not None:
            raise UserError(f"{path} has llm.c's header, and nanoGPT's files have none: use --from llmc")
        yield from _plain(file, "<u2", 0, file.bytes // 2)


def llmc(path: Path) -> Iterator[Piece]:
    """Raises UserError for a file that neither llm.c nor modded-nanogpt would read."""
    with chunked_file.opened(path) as file:
        _refuse_npy(file)
        width = _width(file) if file.bytes >= shard_format.HEADER_BYTES else None
        if width is None:
            known = " or ".join(f"{w.magic}, {w.version} ({w.name})" for w in shard_format.WIDTHS.values())
            raise UserError(f"{path} has no header of llm.c's, {known}; a file without any may be for --from nanogpt")
        count = int(file.read("<i4", 8, 1)[0])
        if count < 1 or file.bytes != shard_format.HEADER_BYTES + width.bytes * count:
            raise UserError(f"{path}: {file.bytes:,} bytes do not fit the {count:,} {width.name} tokens of its header")
        yield from _plain(file, width.dtype, shard_format.HEADER_BYTES, count)


def megatron(path: Path) -> Iterator[Piece]:
    """`path` is that of the .bin. Raises UserError if it and its .idx do not fit each other."""
    with chunked_file.opened(path) as file, chunked_file.opened(path.with_suffix(".idx")) as idx_file:
        index = Index(idx_file)
        if np.dtype(index.dtype).kind == "f":
            raise UserError(f"{idx_file.path}: its tokens are floating-point numbers, code {index.code}")
        first = 0
        for documents in index.pieces(file.bytes):
            ends = np.concatenate([[0], np.cumsum(documents.lengths)])
            begins = ends[documents.starts[:-1]]
            for start, stop, tokens in _sequences(file, index.dtype, documents):
                # One that begins where a piece stops is told of with that piece, so that it may be empty and last.
                cuts = begins[slice(*np.searchsorted(begins, [start or -1, stop], side="right"))] - start
                yield Piece(path, first + start, tokens, cuts)
            first += int(ends[-1])


def uncovered(path: Path) -> tuple[int, int]:
    """How many bytes of Megatron's .bin at `path` its index gives to no document, and of how many. The header of our
    own shards is none of them.

    Raises:
        UserError: the two do not fit each other, or documents overlap.
    """
    with chunked_file.opened(path) as file, chunked_file.opened(path.with_suffix(".idx")) as idx_file:
        ours = file.bytes >= shard_format.HEADER_BYTES and _width(file) is not None
        return Index(idx_file).uncovered(file.bytes, shard_format.HEADER_BYTES if ours else 0), file.bytes


READERS: dict[str, Reader] = {"nanogpt": nanogpt, "llmc": llmc, "megatron": megatron}


def _refuse_npy(file: File) -> None:
    if file.bytes >= len(_NPY) and file.read("|u1", 0, len(_NPY)).tobytes() == _NPY:
        raise UserError(
            f"{file.path} is a .npy file of NumPy's, with a header before its numbers: write the tokens alone, with "
            "`numpy.load(FILE).astype('uint16').tofile('train.bin')`"
        )


def _width(file: File) -> shard_format.Width | None:
    magic, version = file.read("<i4", 0, 2).tolist()
    return next((w for w in shard_format.WIDTHS.values() if (w.magic, w.version) == (magic, version)), None)


def _plain(file: File, dtype: str, place: int, count: int) -> Iterator[Piece]:
    for first, tokens in file.pieces(dtype, place, count, PIECE_TOKENS):
        yield Piece(file.path, first, tokens, NO_CUTS)


def _sequences(file: File, dtype: str, documents: Documents) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """The tokens of all sequences, one after the other, in pieces: where each starts and stops among them, and they.

    What lies side by side in the .bin, as Megatron writes it, is read at once.
    """
    size = np.dtype(dtype).itemsize
    lengths, places = documents.lengths, documents.places
    apart = np.flatnonzero(places[1:] != places[:-1] + lengths[:-1] * size) + 1
    start = 0
    for run in np.split(np.arange(len(lengths)), apart):
        count = int(lengths[run].sum())
        for _, tokens in file.pieces(dtype, int(places[run[0]]), count, PIECE_TOKENS):
            yield start, start + len(tokens), tokens
            start += len(tokens)
