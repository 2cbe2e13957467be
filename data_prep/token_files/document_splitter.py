"""A stream of tokens, cut into documents.

A document ends at each end-of-text id, and where an index says that the next one begins. Whether the id
stands before each document (llm.c's and ours), behind it (nanoGPT's, and Megatron's with --append-eod) or
nowhere: afterwards it stands before each one. What has nothing in it is left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.token_files.foreign_readers import Piece
from hpcgpt.data.shard_format import Tokens, Width
from hpcgpt.errors import UserError
from hpcgpt.tokenizer.interface import Tokenizer

Block = tuple[Tokens, NDArray[np.int64]]


@dataclass
class Documents:
    """Takes pieces and gives back the documents that are whole; the last one is kept until its end has come.

    `marker` is the end-of-text id of what is read. A document has `most` tokens at most, with its end-of-text, so
    there are never more to keep.
    """

    tokenizer: Tokenizer
    width: Width
    marker: int
    most: int
    read: int = 0  # tokens, end-of-text among them
    marks: int = 0  # end-of-text ids
    unknown: int = 0  # tokens for text that the tokenizer does not know
    off_marks: int = 0  # documents that an index lets begin where there is no end-of-text id
    _starts_with_mark: bool | None = None
    _ends_with_mark: bool = False
    _unfinished: list[Tokens] = field(default_factory=list)
    _waiting: int = 0
    _marks: _Borders = field(default_factory=lambda: _Borders())
    _cuts: _Borders = field(default_factory=lambda: _Borders())

    @property
    def empty(self) -> int:
        """How many documents had nothing in them."""
        return self._cuts.doubled if self._cuts.count else self._marks.doubled

    @property
    def convention(self) -> str:
        """Where the end-of-text id stood in what was read, in words."""
        if not self._marks.count:
            return "nowhere"
        if self._starts_with_mark or self._ends_with_mark:
            return "before each document" if self._starts_with_mark else "behind each document"
        return "between documents, of which the first and the last may be parts"

    def add(self, piece: Piece) -> Block:
        """The documents that end in `piece`: their tokens, end-of-text first (n,), and their lengths (k,).

        Raises:
            UserError: an id that is not in the vocabulary, or a document that is too long.
        """
        marks = np.flatnonzero(piece.tokens == self.marker)
        kept = np.delete(piece.tokens, marks)
        self._check(piece, kept)
        self.read += len(piece.tokens)
        self.marks += len(marks)
        if self.tokenizer.unknown is not None:
            self.unknown += int((kept == self.tokenizer.unknown).sum())
        if len(piece.tokens):
            ends = piece.tokens[[0, -1]] == self.marker
            self._starts_with_mark = bool(ends[0]) if self._starts_with_mark is None else self._starts_with_mark
            self._ends_with_mark = bool(ends[1])
        # From here on places are among the tokens that are kept.
        cuts = piece.cuts - np.searchsorted(marks, piece.cuts)
        marks = marks - np.arange(len(marks))
        self.off_marks += int((~np.isin(cuts[cuts > 0], marks)).sum())
        self._marks.add(marks, len(kept))
        self._cuts.add(cuts, len(kept))
        borders = np.unique(np.concatenate([marks, cuts])) + self._waiting
        self._unfinished.append(kept.astype(self.width.dtype))
        self._waiting += len(kept)
        stop = int(borders[-1]) if len(borders) else 0
        lengths = np.diff(borders, prepend=0)
        self._check_length(max(self._waiting - stop, int(lengths.max(initial=0))), piece)
        return self._taken(stop, lengths[lengths > 0])

    def rest(self) -> Block:
        """The last document, which ended with the stream."""
        if self._cuts.count:
            self._cuts.add(np.zeros(1, np.int64), 0)
        return self._taken(self._waiting, np.array([self._waiting] if self._waiting else [], dtype=np.int64))

    def _taken(self, stop: int, lengths: NDArray[np.int64]) -> Block:
        """The first `stop` of the waiting tokens, as documents of these lengths."""
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

    def _check(self, piece: Piece, kept: NDArray[Any]) -> None:
        size, own, name = self.tokenizer.vocab_size, self.tokenizer.end_of_text, self.tokenizer.name
        if not len(kept):
            return
        if kept.min() < 0 or kept.max() >= size:
            wrong = (piece.tokens != self.marker) & ((piece.tokens < 0) | (piece.tokens >= size))
            at = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{piece.path}: token {piece.first + at:,} is {piece.tokens[at]:,}, and tokenizer {name} has {size:,} "
                "ids: were these tokens made with another one?"
            )
        if own != self.marker and (kept == own).any():
            at = int(np.flatnonzero(piece.tokens == own)[0])
            raise UserError(
                f"{piece.path}: token {piece.first + at:,} is {own:,}, the end-of-text of tokenizer {name}, and "
                f"--end-of-text says that it is {self.marker:,}"
            )

    def _check_length(self, text_tokens: int, piece: Piece) -> None:
        if text_tokens >= self.most:
            raise UserError(
                f"{piece.path}: before token {piece.first + len(piece.tokens):,} is a document that does not fit "
                f"{self.most:,} tokens: is {self.marker:,} the end-of-text id of this file? If so, allow more with "
                "--shard-tokens"
            )


@dataclass
class _Borders:
    """Counts borders, and those that are side by side: between them is a document with nothing in it."""

    count: int = 0
    doubled: int = 0
    last: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def add(self, places: NDArray[np.int64], tokens: int) -> None:
        """Borders at these places, in order, of a piece of so many tokens."""
        self.count += len(places)
        places = np.concatenate([self.last, places])
        self.doubled += int((np.diff(places) == 0).sum())
        self.last = places[-1:] - tokens
