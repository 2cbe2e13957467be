"""Read .idx files, written by hpcgpt or by Megatron's IndexedDatasetBuilder.

``hpcgpt.data.shard_format`` describes the format. In Megatron's files a document may also be several sequences, these
may be anywhere in the .bin, and ids may have other widths. The files are not trusted: sizes are checked on opening, and
lengths, offsets and borders by `Index.chunks`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.token_files.chunked_file import ChunkedFile
from hpcgpt.data.shard_format import IDX_MAGIC, IDX_VERSION
from hpcgpt.errors import UserError

CHUNK_SEQUENCES = 1 << 20  # at most, but a chunk has at least one document
HEAD_BYTES = len(IDX_MAGIC) + struct.calcsize("<QBQQ")
# Megatron's codes. The two floating-point types are listed so that the error can name them.
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


@dataclass(frozen=True)
class IndexedDocuments:
    """Consecutive documents of an index, from number `first` on.

    `lengths` (tokens) and `offsets` (bytes) are of their sequences (s,). `starts` (d + 1,) is the number of each
    document's first sequence, and the end of the last document.
    """

    first: int
    lengths: NDArray[np.int64]
    offsets: NDArray[np.int64]
    starts: NDArray[np.int64]


class Index:
    """An .idx file: `sequences` in `documents`, whose ids are of `dtype`."""

    def __init__(self, file: ChunkedFile) -> None:
        self._file = file
        head = file.read("|u1", 0, min(file.bytes, HEAD_BYTES)).tobytes()
        if len(head) < HEAD_BYTES or not head.startswith(IDX_MAGIC):
            raise UserError(f"{file.path}: not an index of Megatron: it does not start with MMIDIDX")
        version, self.code, self.sequences, borders = struct.unpack_from("<QBQQ", head, len(IDX_MAGIC))
        if version != IDX_VERSION:
            raise UserError(f"{file.path}: version {version}, expected {IDX_VERSION}")
        if self.code not in DTYPES:
            raise UserError(f"{file.path}: unknown type of tokens, code {self.code}; expected 1 to {max(DTYPES)}")
        self.dtype = DTYPES[self.code]
        if not borders:
            raise UserError(f"{file.path}: no document borders; there should be one more than documents")
        self.documents = borders - 1
        self._offsets = HEAD_BYTES + 4 * self.sequences
        self._borders = self._offsets + 8 * self.sequences
        expected = self._borders + 8 * borders
        if file.bytes == expected + self.sequences != expected:
            raise UserError(f"{file.path}: its sequences have modes, so this data set is not only text")
        if file.bytes != expected:
            raise UserError(
                f"{file.path}: {file.bytes:,} bytes, but {self.sequences:,} sequences in {self.documents:,} documents "
                f"take {expected:,}"
            )

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the lengths in tokens of sequences start ... stop - 1."""
        return self._file.read("<i4", HEAD_BYTES + 4 * start, stop - start).astype(np.int64)

    def offsets(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where sequences start ... stop - 1 begin in the .bin, in bytes."""
        return self._file.read("<i8", self._offsets + 8 * start, stop - start)

    def borders(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the first sequences of documents start ... stop - 1. Border number `documents` is the end."""
        return self._file.read("<i8", self._borders + 8 * start, stop - start)

    def chunks(self, bin_bytes: int) -> Iterator[IndexedDocuments]:
        """Yield all documents in chunks, with every number checked.

        Raises:
            UserError: borders are not in order or do not cover all sequences, a length is below 0, a sequence is
                outside of a .bin of `bin_bytes`, or sequences overlap: they have more tokens than the .bin.
        """
        document = at = 0
        left = bin_bytes // np.dtype(self.dtype).itemsize
        while document < self.documents:
            borders = self.borders(document, min(document + CHUNK_SEQUENCES, self.documents) + 1)
            steps = np.diff(borders)
            if borders[0] != at or (steps < 0).any() or borders[-1] > self.sequences:
                raise UserError(
                    f"{self._file.path}: the borders of documents {document:,} to {document + len(steps) - 1:,} are "
                    f"not in order within its {self.sequences:,} sequences"
                )
            count = max(1, int(np.searchsorted(borders, at + CHUNK_SEQUENCES, side="right")) - 1)
            stop = int(borders[count])
            lengths, offsets = self._read_checked(at, stop, bin_bytes)
            left -= int(lengths.sum())
            if left < 0:
                raise UserError(f"{self._file.path}: its sequences have more tokens than the .bin, so they overlap")
            yield IndexedDocuments(document, lengths, offsets, borders[: count + 1] - at)
            document, at = document + count, stop
        if at != self.sequences:
            raise UserError(f"{self._file.path}: the documents end at sequence {at:,} of {self.sequences:,}")

    def uncovered(self, bin_bytes: int, head_bytes: int = 0) -> int:
        """Return how many bytes of a .bin of `bin_bytes` belong to no sequence, without `head_bytes` at its start.

        Raises:
            UserError: as for `chunks`, or two sequences share bytes.
        """
        size = np.dtype(self.dtype).itemsize
        begins, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for documents in self.chunks(bin_bytes):
            some = documents.lengths > 0
            starts = documents.offsets[some]
            stops = starts + documents.lengths[some] * size
            # Of a run of adjacent sequences, as Megatron writes them, only the start and the end are kept.
            apart = np.flatnonzero(starts[1:] != stops[:-1]) + 1
            begins.append(starts[np.append(0, apart)] if len(starts) else starts)
            ends.append(stops[np.append(apart, len(stops)) - 1] if len(starts) else stops)
        begin, end = np.concatenate(begins), np.concatenate(ends)
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], end[order]
        if (begin[1:] < end[:-1]).any():
            at = int(begin[1:][begin[1:] < end[:-1]][0])
            raise UserError(f"{self._file.path}: two sequences have byte {at:,} of the .bin, so they overlap")
        if len(begin) and begin[0] < head_bytes:
            head_bytes = 0
        return bin_bytes - head_bytes - int((end - begin).sum())

    def _read_checked(self, start: int, stop: int, bin_bytes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        lengths, offsets = self.lengths(start, stop), self.offsets(start, stop)
        room = bin_bytes - lengths * np.dtype(self.dtype).itemsize
        wrong = np.flatnonzero((lengths < 0) | (offsets < 0) | (offsets > room))
        if len(wrong):
            at = wrong[0]
            raise UserError(
                f"{self._file.path}: sequence {start + at:,} has {lengths[at]:,} tokens at byte {offsets[at]:,}, which "
                f"is outside of a .bin of {bin_bytes:,} bytes"
            )
        return lengths, offsets
