"""Encode Chinese text by looking up single characters: the same ids as the wrapped encoder gives, several times faster.

Byte-level BPE is slow if words are long and each is new. In Chinese, a "word" is the 5 to 15 characters between two
punctuation marks. But a vocabulary that was trained on English, like GPT-2's, has very few tokens with bytes of two
neighbouring Chinese characters. Where no token crosses the border of two characters, BPE never merges across it, so the
ids are those of the single characters, which can be looked up in a table.

The table holds ideographs and Chinese punctuation, of three bytes each. A character of it is *free* if its neighbours
on both sides are in the table, too (or are a line feed between two such characters), and if no token of the vocabulary
crosses either border: no token holds an end of the one character followed by a beginning of the next. Each run of free
characters is replaced by one stand-in character::

    text          他说：斗之力，三段！ OK
    shortened     他亖！ OK                    encoded as usual; 亖 replaces the run 说：斗之力，三段
    ids           of the shortened text, with the ids of the run in place of the stand-in's

The neighbours of a run stay, so that white space, digits and other letters around it are split as before. That is so
for GPT-2's pattern, in which only the class of a character counts (letter, number, white space, other), and a single
line feed between two other characters is a word of its own. Vocabularies trained on Chinese have tokens of several
characters. Then few characters are free, and the text is encoded as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.encode.interface import EncodedBatch, Encoder
from hpcgpt.output import streams

# Letters since Unicode 3, and punctuation since Unicode 1.1, so every encoder classifies them alike.
_LETTERS = (*range(0x3400, 0x4DB6), *range(0x4E00, 0x9FA6))
_PUNCTUATION = tuple(map(ord, "、。〈〉《》「」『』【】〔〕，！？；：（）．～—…‘’“”"))
_COMMA = "、"
# Rare letters, of which one is used. A batch in which it occurs is encoded without this module.
_STAND_INS = "亖龘㐀㒲"
_MOST_IDS = 3  # of a character, which is three bytes here
_NONE = 0xFFFF
_MOST_KINDS = 16
# With a smaller share of free characters it would not be faster.
_LEAST_FREE = 0.2
_SAMPLE_EVERY = 61  # characters

Ids = NDArray[np.uint32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Table:
    """What is known of each code point below 2**16.

    There are up to 16 kinds of tokens that cross the border of two characters, a bit for each. A token crosses a border
    if a bit is set both in `ends` of the first character and in `starts` of the second.
    """

    known: Bools
    ends: NDArray[np.uint16]
    starts: NDArray[np.uint16]
    ids: NDArray[np.uint64]  # up to four ids of 16 bits, padded with _NONE: one look-up for all is four times as fast
    counts: NDArray[np.uint8]
    stand_in: str
    stand_in_ids: Ids


class ByCharacterEncoder:
    """Wraps an encoder whose vocabulary is `tokens()` and whose pattern is GPT-2's.

    Before the first Chinese text, the two are compared on `equivalence_texts`. If they differ, everything is left to
    the wrapped encoder.
    """

    def __init__(
        self, inner: Encoder, tokens: Callable[[], Collection[bytes]], equivalence_texts: Sequence[str] = ()
    ) -> None:
        self._inner, self._tokens, self._equivalence_texts = inner, tokens, equivalence_texts
        self.name, self.fallback_reason = inner.name, inner.fallback_reason

    def batch(self, texts: Sequence[str]) -> EncodedBatch:
        if not _looks_chinese(texts) or self._table is None:
            return self._inner.batch(texts)
        if any(self._table.stand_in in text for text in texts):
            return self._inner.batch(texts)
        points, ends = _code_points(texts)
        free = _find_free(points, ends, self._table)
        if np.count_nonzero(free) < _LEAST_FREE * len(free):
            return self._inner.batch(texts)
        return self._encode(points, ends, free, self._table)

    @cached_property
    def _table(self) -> _Table | None:
        table = _build_table(self._inner, self._tokens())
        if table is None or not self._equivalence_texts:
            return table
        points, ends = _code_points(self._equivalence_texts)
        ids, counts = self._encode(points, ends, _find_free(points, ends, table), table)
        expected, expected_counts = self._inner.batch(self._equivalence_texts)
        if np.array_equal(ids, expected) and np.array_equal(counts, expected_counts):
            return table
        streams.warn(f"Chinese is encoded by {self.name} alone: looking up single characters gives other ids")
        return None

    def _encode(self, points: NDArray[np.uint32], ends: NDArray[np.int64], free: Bools, table: _Table) -> EncodedBatch:
        """Encode the texts, given by their code points and ends: runs of `free` characters from the table."""
        run_starts = free.copy()
        run_starts[1:] &= ~free[:-1]
        removed = np.flatnonzero(free ^ run_starts)
        short = np.where(run_starts, np.uint32(ord(table.stand_in)), points)[~free | run_starts]
        short_ends = ends - np.searchsorted(removed, ends)
        text = short.tobytes().decode("utf-32-le")
        ids, counts = self._inner.batch([text[a:b] for a, b in pairwise([0, *short_ends.tolist()])])
        looked_up = points[free].astype(np.uint16)
        new = table.ids[looked_up].view(np.uint16)  # (4 * looked_up,)
        run_counts = np.add.reduceat(table.counts[looked_up], np.flatnonzero(run_starts[free]), dtype=np.int64)
        text_of_run = np.searchsorted(ends, np.flatnonzero(run_starts), side="right")
        added = run_counts - len(table.stand_in_ids)
        added_by_text = np.bincount(text_of_run, weights=added, minlength=len(counts)).astype(np.int64)
        return _insert(ids, table.stand_in_ids, new[new != _NONE], run_counts), counts + added_by_text


def _looks_chinese(texts: Sequence[str]) -> bool:
    """Return whether enough of a sample is Chinese. (All code points would take as long as encoding English.)"""
    sample = "".join([text[::_SAMPLE_EVERY] for text in texts if not text.isascii()])
    points = np.frombuffer(sample.encode("utf-32-le"), dtype="<u4")
    found = int(np.count_nonzero((points >= 0x3000) & (points < 0xA000)))
    return 0 < found >= _LEAST_FREE * sum(map(len, texts)) / _SAMPLE_EVERY


def _code_points(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Return the code points of the texts, concatenated (n,), and where each text ends (k,)."""
    points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype="<u4")
    return points, np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))


def _find_free(points: NDArray[np.uint32], ends: NDArray[np.int64], table: _Table) -> Bools:
    """Find the free characters of the texts that end at `ends` (n,)."""
    low = points.astype(np.uint16)
    known = table.known[low]
    if int(points.max()) > 0xFFFF:
        known &= points < 0x10000
    feeds = np.flatnonzero(points[1:-1] == 10) + 1
    known[feeds[known[feeds - 1] & known[feeds + 1]]] = True
    uncrossed = known[:-1] & known[1:]  # (n - 1,) the borders between characters
    uncrossed &= (table.ends[low[:-1]] & table.starts[low[1:]]) == 0
    free = np.zeros(len(points), dtype=np.bool_)
    free[1:-1] = uncrossed[:-1] & uncrossed[1:]
    free[ends[ends < len(points)]] = False  # so that no run continues in the next text
    return free


def _insert(ids: Ids, stand_in_ids: Ids, new: NDArray[np.uint16], counts: NDArray[np.int64]) -> Ids:
    """Replace the n-th occurrence of `stand_in_ids` in `ids` by the next `counts[n]` of the `new` ids."""
    starts = np.flatnonzero(ids[: len(ids) - len(stand_in_ids) + 1] == stand_in_ids[0])
    for number, token in enumerate(stand_in_ids[1:], 1):
        starts = starts[ids[starts + number] == token]
    assert len(starts) == len(counts)
    # Lengths of what is kept and of the stand-ins, which alternate: kept, stand-in, kept, ..., kept.
    kept_lengths = np.diff(starts, prepend=-len(stand_in_ids), append=len(ids)) - len(stand_in_ids)
    lengths = np.empty(2 * len(starts) + 1, dtype=np.int64)
    lengths[0::2], lengths[1::2] = kept_lengths, len(stand_in_ids)
    kept = ids[np.repeat(_alternating(len(lengths)), lengths)]
    lengths[1::2] = counts
    is_kept = np.repeat(_alternating(len(lengths)), lengths)
    out = np.empty(len(is_kept), dtype=np.uint32)
    out[is_kept] = kept
    out[~is_kept] = new
    return out


def _alternating(count: int) -> Bools:
    found = np.zeros(count, dtype=np.bool_)
    found[0::2] = True
    return found


def _build_table(inner: Encoder, tokens: Collection[bytes]) -> _Table | None:
    """Build the table; return None if no stand-in is possible, or there are too many kinds of crossing tokens."""
    points = np.array([*_LETTERS, *_PUNCTUATION])
    letters = np.frombuffer("".join(map(chr, points)).encode(), dtype=np.uint8).reshape(-1, 3)
    kinds = _crossing_kinds(tokens, letters)
    if len(kinds) > _MOST_KINDS or len(tokens) >= _NONE:
        return None
    ends, starts = np.zeros(1 << 16, dtype=np.uint16), np.zeros(1 << 16, dtype=np.uint16)
    for bit, (end, start) in enumerate(kinds):
        ends[points[_ending(letters, end)]] |= 1 << bit
        starts[points[_starting(letters, start)]] |= 1 << bit
    stand_in = next((letter for letter in _STAND_INS if not ends[ord(letter)] and not starts[ord(letter)]), None)
    if stand_in is None:
        return None
    stand_in_ids = inner.batch([stand_in * 2])[0]
    stand_in_ids = stand_in_ids[: len(stand_in_ids) // 2]
    known = np.zeros(1 << 16, dtype=np.bool_)
    ids = np.full((1 << 16, _MOST_IDS + 1), _NONE, dtype=np.uint16)
    ids[10, 0] = inner.batch(["\n"])[0][0]
    for group, neighbour in ((_LETTERS, stand_in), (_PUNCTUATION, _COMMA)):
        _fill(ids, known, np.array(group), neighbour, inner)
    known[ord(stand_in)] = False
    counts = (ids != _NONE).sum(axis=1).astype(np.uint8)
    return _Table(known, ends, starts, ids.view(np.uint64)[:, 0], counts, stand_in, stand_in_ids)


def _fill(ids: NDArray[np.uint16], known: Bools, points: NDArray[np.int64], neighbour: str, inner: Encoder) -> None:
    """Enter the ids of characters that have the same ids alone and within a run.

    Alone a character may be looked up as a whole word; within a run its bytes are merged.
    """
    own, sizes = inner.batch([chr(point) for point in points])
    within, counts = inner.batch([f"{neighbour}{chr(point)}{neighbour}" for point in points])
    edge = len(inner.batch([neighbour * 2])[0]) // 2
    known[points] = counts == sizes + 2 * edge
    own_starts, starts = np.cumsum(sizes) - sizes, np.cumsum(counts) - counts + edge
    for number in range(_MOST_IDS):
        has = known[points] & (sizes > number)
        ids[points[has], number] = own[own_starts[has] + number]
        known[points[has]] &= own[own_starts[has] + number] == within[starts[has] + number]


def _crossing_kinds(tokens: Collection[bytes], letters: NDArray[np.uint8]) -> list[tuple[bytes, bytes]]:
    """Return which bytes tokens have before and after a border of two of the characters (n, 3).

    Of these pairs only the shortest are returned: one byte on each side includes all longer pairs with these bytes.
    """
    found = {
        (token[:at][-3:], token[at:][:3])
        for token in tokens
        if not token.isascii()
        for at in range(1, len(token))
        if token[at - 1] >= 0x80 and token[at] >= 0xC0
    }
    ends = {end for end in {end for end, _ in found} if _ending(letters, end).any()}
    starts = {start for start in {start for _, start in found} if _starting(letters, start).any()}
    pairs = [(end, start) for end, start in found if end in ends and start in starts]
    return sorted(
        (end, start)
        for end, start in pairs
        if not any((a, b) != (end, start) and end.endswith(a) and start.startswith(b) for a, b in pairs)
    )


def _ending(letters: NDArray[np.uint8], end: bytes) -> Bools:
    """Return which of the characters (n, 3) end with these bytes (n,)."""
    return _equal(letters[:, 3 - len(end) :], end)


def _starting(letters: NDArray[np.uint8], start: bytes) -> Bools:
    """Return which of the characters (n, 3) start with these bytes (n,)."""
    return _equal(letters[:, : len(start)], start)


def _equal(rows: NDArray[np.uint8], expected: bytes) -> Bools:
    """Return which rows (n, k) are `expected` (n,). Column by column: `all(axis=1)` takes ten times as long."""
    equal = np.ones(len(rows), dtype=np.bool_)
    for column, byte in enumerate(expected):
        equal &= rows[:, column] == byte
    return equal
