"""Split a stream of tokens into documents.

A document ends at each end-of-text id, and where an index says that the next one begins. The id may be before each
document (llm.c, hpcgpt), after each (nanoGPT, Megatron with --append-eod) or nowhere; in the result it is before each.
Empty documents are left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.token_files.foreign_readers import TokenChunk
from hpcgpt.data.shard_format import Tokens, Width
from hpcgpt.errors import UserError
from hpcgpt.tokenizer.interface import Tokenizer

DocumentBatch = tuple[Tokens, NDArray[np.int64]]


@dataclass
class DocumentSplitter:
    """Takes chunks and returns the documents that are complete; the last one is kept until its end is known.

    `eot_id` is the end-of-text id in the input. A document has at most `most` tokens, with its end-of-text, so no more
    than that are kept.
    """

    tokenizer: Tokenizer
    width: Width
    eot_id: int
    most: int
    read: int = 0  # tokens, with end-of-text
    eot_tokens: int = 0  # end-of-text ids
    unknown: int = 0  # tokens for text that the tokenizer cannot encode
    starts_without_eot: int = 0  # documents that begin, by the index, where there is no end-of-text id
    _starts_with_eot: bool | None = None
    _ends_with_eot: bool = False
    _unfinished: list[Tokens] = field(default_factory=list)
    _waiting: int = 0
    _eots: _Borders = field(default_factory=lambda: _Borders())
    _starts: _Borders = field(default_factory=lambda: _Borders())

    @property
    def empty(self) -> int:
        """How many documents were empty."""
        return self._starts.adjacent if self._starts.count else self._eots.adjacent

    @property
    def convention(self) -> str:
        """Where the end-of-text id was in the input, in words."""
        if not self._eots.count:
            return "nowhere"
        if self._starts_with_eot or self._ends_with_eot:
            return "before each document" if self._starts_with_eot else "after each document"
        return "between documents, of which the first and the last may be parts"

    def add(self, chunk: TokenChunk) -> DocumentBatch:
        """Return the documents that end in `chunk`: their tokens, each after an end-of-text id (n,), and lengths (k,).

        Raises:
            UserError: an id is not in the vocabulary, or a document is too long.
        """
        eots = np.flatnonzero(chunk.tokens == self.eot_id)
        kept = np.delete(chunk.tokens, eots)
        self._check(chunk, kept)
        self.read += len(chunk.tokens)
        self.eot_tokens += len(eots)
        if self.tokenizer.unknown is not None:
            self.unknown += int((kept == self.tokenizer.unknown).sum())
        if len(chunk.tokens):
            ends = chunk.tokens[[0, -1]] == self.eot_id
            self._starts_with_eot = bool(ends[0]) if self._starts_with_eot is None else self._starts_with_eot
            self._ends_with_eot = bool(ends[1])
        # From here on indices are among the kept tokens.
        document_starts = chunk.document_starts - np.searchsorted(eots, chunk.document_starts)
        eots = eots - np.arange(len(eots))
        self.starts_without_eot += int((~np.isin(document_starts[document_starts > 0], eots)).sum())
        self._eots.add(eots, len(kept))
        self._starts.add(document_starts, len(kept))
        borders = np.unique(np.concatenate([eots, document_starts])) + self._waiting
        self._unfinished.append(kept.astype(self.width.dtype))
        self._waiting += len(kept)
        stop = int(borders[-1]) if len(borders) else 0
        lengths = np.diff(borders, prepend=0)
        self._check_length(max(self._waiting - stop, int(lengths.max(initial=0))), chunk)
        return self._take(stop, lengths[lengths > 0])

    def rest(self) -> DocumentBatch:
        """Return the last document, which ends with the stream."""
        if self._starts.count:
            self._starts.add(np.zeros(1, np.int64), 0)
        return self._take(self._waiting, np.array([self._waiting] if self._waiting else [], dtype=np.int64))

    def _take(self, stop: int, lengths: NDArray[np.int64]) -> DocumentBatch:
        """Take the first `stop` of the waiting tokens, as documents of these lengths."""
        if not stop:
            return np.zeros(0, self.width.dtype), np.zeros(0, np.int64)
        stream: NDArray[Any] = np.concatenate(self._unfinished)
        self._unfinished, self._waiting = [stream[stop:]], len(stream) - stop
        lengths = lengths + 1
        tokens: Tokens = np.full(stop + len(lengths), self.tokenizer.end_of_text, dtype=self.width.dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[np.cumsum(lengths) - lengths] = False
        tokens[is_text] = stream[:stop]
        return tokens, lengths

    def _check(self, chunk: TokenChunk, kept: NDArray[Any]) -> None:
        size, own, name = self.tokenizer.vocab_size, self.tokenizer.end_of_text, self.tokenizer.name
        if not len(kept):
            return
        if kept.min() < 0 or kept.max() >= size:
            wrong = (chunk.tokens != self.eot_id) & ((chunk.tokens < 0) | (chunk.tokens >= size))
            at = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{chunk.path}: token {chunk.first + at:,} is {chunk.tokens[at]:,}, and tokenizer {name} has {size:,} "
                "ids: were these tokens made with another one?"
            )
        if own != self.eot_id and (kept == own).any():
            at = int(np.flatnonzero(chunk.tokens == own)[0])
            raise UserError(
                f"{chunk.path}: token {chunk.first + at:,} is {own:,}, the end-of-text of tokenizer {name}, and "
                f"--end-of-text says that it is {self.eot_id:,}"
            )

    def _check_length(self, text_tokens: int, chunk: TokenChunk) -> None:
        if text_tokens >= self.most:
            raise UserError(
                f"{chunk.path}: before token {chunk.first + len(chunk.tokens):,} is a document that does not fit "
                f"{self.most:,} tokens: is {self.eot_id:,} the end-of-text id of this file? If so, allow more with "
                "--shard-tokens"
            )


@dataclass
class _Borders:
    """Counts borders of documents, and pairs of adjacent ones, between which is an empty document."""

    count: int = 0
    adjacent: int = 0
    last: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, indices: NDArray[np.int64], tokens: int) -> None:
        """Count borders at these indices, in order, of a chunk with this many kept tokens."""
        self.count += len(indices)
        indices = np.concatenate([self.last, indices])
        self.adjacent += int((np.diff(indices) == 0).sum())
        self.last = indices[-1:] - tokens
