"""Chinese text, a character at a time: the same ids as any encoder's, several times faster.

Byte-level BPE is slow where words are long and every one is new, and what is a word to it, in Chinese, are the 5 to
15 characters between two marks. But a vocabulary that was made of English, as GPT-2's, has hardly a token that goes
over the border of two Chinese characters. Where none does, BPE never merges across the border, so the ids are those
of each character, one after the other, and a table has them.

The table has ideographs and the marks of Chinese text, of three bytes each. Of its characters, those are *free* that
have one of the table (or a line feed, in such company) on both sides, and no token of the vocabulary goes over either
border: none ends with the beginning of the one behind and has before that the end of the one in front. All free
characters in a row are taken out, and a stand-in is left in their place::

    text          他说：斗之力，三段！ OK
    shortened     他亖！ OK                    encoded as ever; each 亖 in it stands for a row
    ids           those, with the ids of 说：斗之力，三段 in place of the stand-in's

A row keeps its neighbours, so what comes before and behind looks as it did: blanks, digits and letters of other kinds
are cut as they were. That holds for GPT-2's pattern, to which all that matters of a character is whether it is a
letter, a mark or a blank; a single line feed between two others is a word of its own to it. Vocabularies made of
Chinese have tokens of several characters: then few are free, and the text goes to the encoder as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Letters since Unicode 3, and marks since Unicode 1.1: so they are the same to every encoder.
_LETTERS = (*range(0x3400, 0x4DB6), *range(0x4E00, 0x9FA6))
_MARKS = tuple(map(ord, "、。〈〉《》「」『』【】〔〕，！？；：（）．～—…‘’“”"))
_PLAIN_MARK = "、"
# Rare letters. A batch that has the chosen one goes to the encoder as it is.
_STAND_INS = "亖龘㐀㒲"
_MOST_IDS = 3  # of a character, which is three bytes here
_NONE = 0xFFFF
_MOST_KINDS = 16
# Below this share of free characters it does not pay.
_LEAST_FREE = 0.2
_SAMPLED = 61

Ids = NDArray[np.uint32]
Batch = tuple[Ids, NDArray[np.int64]]
Bools = NDArray[np.bool_]


class Encoder(Protocol):
    name: str
    why: str

    def batch(self, texts: Sequence[str]) -> Batch: ...


@dataclass(frozen=True)
class _Table:
    """By code point, below 2**16. Tokens that go over the border of two of the characters are of up to 16 kinds:
    a border is open if a bit is set in `ends` of the one character and in `starts` of the next."""

    known: Bools
    ends: NDArray[np.uint16]
    starts: NDArray[np.uint16]
    ids: NDArray[np.uint64]  # four of 16 bits, filled up with _NONE: looked up at once, which is four times as fast
    counts: NDArray[np.uint8]
    stand_in: str
    mark: Ids  # its ids


class ByCharacter:
    """An encoder around another one, whose vocabulary is `tokens` and whose pattern is GPT-2's. Before the first
    Chinese text the two are compared on the texts of `proof`; if they differ, this one lets everything through."""

    def __init__(self, inner: Encoder, tokens: Collection[bytes], proof: Sequence[str] = ()) -> None:
        self._inner, self._tokens, self._proof = inner, tokens, proof
        self.name, self.why = inner.name, inner.why

    def batch(self, texts: Sequence[str]) -> Batch:
        if not _chinese(texts) or self._table is None:
            return self._inner.batch(texts)
        if any(self._table.stand_in in text for text in texts):
            return self._inner.batch(texts)
        points, ends = _laid_out(texts)
        free = _free(points, ends, self._table)
        if np.count_nonzero(free) < _LEAST_FREE * len(free):
            return self._inner.batch(texts)
        return self._joined(points, ends, free, self._table)

    @cached_property
    def _table(self) -> _Table | None:
        table = _table(self._inner, self._tokens)
        if table is None or not self._proof:
            return table
        points, ends = _laid_out(self._proof)
        ids, counts = self._joined(points, ends, _free(points, ends, table), table)
        expected, expected_counts = self._inner.batch(self._proof)
        if np.array_equal(ids, expected) and np.array_equal(counts, expected_counts):
            return table
        print(f"Chinese is encoded by {self.name} alone: a character at a time its ids are others", file=sys.stderr)
        return None

    def _joined(self, points: NDArray[np.uint32], ends: NDArray[np.int64], free: Bools, table: _Table) -> Batch:
        rows = free.copy()  # where a row begins
        rows[1:] &= ~free[:-1]
        first = np.flatnonzero(rows)
        left_out = np.flatnonzero(free ^ rows)
        short = np.where(rows, np.uint32(ord(table.stand_in)), points)[~free | rows]
        borders = ends - np.searchsorted(left_out, ends)
        text = short.tobytes().decode("utf-32-le")
        ids, counts = self._inner.batch([text[a:b] for a, b in pairwise([0, *borders.tolist()])])
        taken = points[free].astype(np.uint16)
        new = table.ids[taken].view(np.uint16)  # (4 * taken,)
        grown = np.add.reduceat(table.counts[taken], np.flatnonzero(rows[free]), dtype=np.int64)
        text_of = np.searchsorted(ends, first, side="right")
        more = np.bincount(text_of, weights=grown - len(table.mark), minlength=len(counts)).astype(np.int64)
        return _put_in(ids, table.mark, new[new != _NONE], grown), counts + more


def _chinese(texts: Sequence[str]) -> bool:
    """Does it look as if it could pay? A sample tells: to lay the texts out takes as long as to encode English."""
    sample = "".join([text[::_SAMPLED] for text in texts if not text.isascii()])
    points = np.frombuffer(sample.encode("utf-32-le"), dtype="<u4")
    found = int(np.count_nonzero((points >= 0x3000) & (points < 0xA000)))
    return 0 < found >= _LEAST_FREE * sum(map(len, texts)) / _SAMPLED


def _laid_out(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The code points of the texts, one after the other (n,), and where each text ends (k,)."""
    points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")
    return points, np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))


def _free(points: NDArray[np.uint32], ends: NDArray[np.int64], table: _Table) -> Bools:
    """Of each character of the texts that end at `ends`: is it to be taken out (n,)?"""
    low = points.astype(np.uint16)
    known = table.known[low]
    if int(points.max()) > 0xFFFF:
        known &= points < 0x10000
    feeds = np.flatnonzero(points[1:-1] == 10) + 1
    known[feeds[known[feeds - 1] & known[feeds + 1]]] = True
    border = known[:-1] & known[1:]  # (n - 1,) between a character and the next
    border &= (table.ends[low[:-1]] & table.starts[low[1:]]) == 0
    free = np.zeros(len(points), dtype=np.bool_)
    free[1:-1] = border[:-1] & border[1:]
    free[ends[ends < len(points)]] = False  # so no row goes over the border of two texts
    return free


def _put_in(ids: Ids, mark: Ids, new: NDArray[np.uint16], counts: NDArray[np.int64]) -> Ids:
    """`ids`, with the next of `counts` of the `new` ones in place of each `mark`."""
    places = np.flatnonzero(ids[: len(ids) - len(mark) + 1] == mark[0])
    for number, token in enumerate(mark[1:], 1):
        places = places[ids[places + number] == token]
    assert len(places) == len(counts)
    # What stays and what goes, in turn: stays, mark, stays, mark, ..., stays.
    stays = np.diff(places, prepend=-len(mark), append=len(ids)) - len(mark)
    in_turn = np.empty(2 * len(places) + 1, dtype=np.int64)
    in_turn[0::2], in_turn[1::2] = stays, len(mark)
    kept = ids[np.repeat(_alternating(len(in_turn)), in_turn)]
    in_turn[1::2] = counts
    old = np.repeat(_alternating(len(in_turn)), in_turn)
    out = np.empty(len(old), dtype=np.uint32)
    out[old] = kept
    out[~old] = new
    return out


def _alternating(count: int) -> Bools:
    found = np.zeros(count, dtype=np.bool_)
    found[0::2] = True
    return found


def _table(inner: Encoder, tokens: Collection[bytes]) -> _Table | None:
    """None if no stand-in can be had, or tokens go over borders in too many ways."""
    points = np.array([*_LETTERS, *_MARKS])
    letters = np.frombuffer("".join(map(chr, points)).encode(), dtype=np.uint8).reshape(-1, 3)
    kinds = _over_borders(tokens, letters)
    if len(kinds) > _MOST_KINDS or len(tokens) >= _NONE:
        return None
    ends, starts = np.zeros(1 << 16, dtype=np.uint16), np.zeros(1 << 16, dtype=np.uint16)
    for bit, (end, start) in enumerate(kinds):
        ends[points[_ending(letters, end)]] |= 1 << bit
        starts[points[_starting(letters, start)]] |= 1 << bit
    closed = [letter for letter in _STAND_INS if not ends[ord(letter)] and not starts[ord(letter)]]
    if not closed:
        return None
    stand_in = closed[0]
    mark = inner.batch([stand_in * 2])[0]
    mark = mark[: len(mark) // 2]
    known = np.zeros(1 << 16, dtype=np.bool_)
    ids = np.full((1 << 16, _MOST_IDS + 1), _NONE, dtype=np.uint16)
    ids[10, 0] = inner.batch(["\n"])[0][0]
    for group, beside in ((_LETTERS, stand_in), (_MARKS, _PLAIN_MARK)):
        _fill(ids, known, np.array(group), beside, inner)
    known[ord(stand_in)] = False
    counts = (ids != _NONE).sum(axis=1).astype(np.uint8)
    return _Table(known, ends, starts, ids.view(np.uint64)[:, 0], counts, stand_in, mark)


def _fill(ids: NDArray[np.uint16], known: Bools, points: NDArray[np.int64], beside: str, inner: Encoder) -> None:
    """The ids of those characters that have the same within a row, where they are merged, and by themselves, where
    they may be looked up as a whole."""
    own, sizes = inner.batch([chr(point) for point in points])
    within, counts = inner.batch([f"{beside}{chr(point)}{beside}" for point in points])
    edge = len(inner.batch([beside * 2])[0]) // 2
    known[points] = counts == sizes + 2 * edge
    own_starts, starts = np.cumsum(sizes) - sizes, np.cumsum(counts) - counts + edge
    for number in range(_MOST_IDS):
        has = known[points] & (sizes > number)
        ids[points[has], number] = own[own_starts[has] + number]
        known[points[has]] &= own[own_starts[has] + number] == within[starts[has] + number]


def _over_borders(tokens: Collection[bytes], letters: NDArray[np.uint8]) -> list[tuple[bytes, bytes]]:
    """What tokens have on both sides of a border of two of the characters (n, 3). A pair that says less, as one byte
    on each side, stands for those that say more."""
    found = {
        (token[:place][-3:], token[place:][:3])
        for token in tokens
        for place in range(1, len(token))
        if token[place - 1] >= 0x80 and token[place] >= 0xC0
    }
    pairs = [(end, start) for end, start in found if _ending(letters, end).any() and _starting(letters, start).any()]
    return sorted(
        (end, start)
        for end, start in pairs
        if not any((a, b) != (end, start) and end.endswith(a) and start.startswith(b) for a, b in pairs)
    )


def _ending(letters: NDArray[np.uint8], end: bytes) -> Bools:
    """Which of the characters (n, 3) end so, or are the end of it (n,)."""
    bytes_ = np.frombuffer(end, dtype=np.uint8)
    return np.asarray((letters[:, 3 - len(end) :] == bytes_).all(axis=1))


def _starting(letters: NDArray[np.uint8], start: bytes) -> Bools:
    bytes_ = np.frombuffer(start, dtype=np.uint8)
    return np.asarray((letters[:, : len(start)] == bytes_).all(axis=1))
