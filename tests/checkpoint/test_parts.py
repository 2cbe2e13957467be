"""hpcgpt.checkpoint.parts: each byte is written by one rank and checked by one."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from hpcgpt.checkpoint import parts
from hpcgpt.checkpoint.parts import PAGE, Part, own_parts, padded, place_of


@pytest.mark.parametrize(("ranks", "files"), [(1, 1), (2, 1), (7, 3), (64, 8), (64, 63), (64, 64), (5, 100)])
def test_ranks_write_into_consecutive_places_that_share_no_page(ranks: int, files: int) -> None:
    dice = random.Random(ranks)
    sizes = [(padded(dice.randrange(1, 3 * PAGE)), padded(dice.randrange(9 * PAGE))) for _ in range(ranks)]
    places = [place_of(sizes, rank, files) for rank in range(ranks)]
    assert {place.files for place in places} == {min(ranks, files)}
    assert {place.number for place in places} == set(range(min(ranks, files)))
    for number in range(min(ranks, files)):
        group = [rank for rank in range(ranks) if places[rank].number == number]
        assert group == list(range(group[0], group[-1] + 1)), "the rows of consecutive ranks are in one file"
        assert [rank for rank in group if places[rank].is_first] == group[:1]
        assert [rank for rank in group if places[rank].is_last] == group[-1:]
        written = [(places[rank].header, sizes[rank][0]) for rank in group]
        written += [(places[rank].tensors, sizes[rank][1]) for rank in group]
        assert all(start + size == after for (start, size), (after, _) in pairwise(written))
        assert written[0][0] == 0
        assert all(start % PAGE == 0 for start, _ in written)
        assert {places[rank].header_bytes for rank in group} == {places[group[0]].tensors}


def test_there_are_more_files_than_asked_for_where_a_header_would_be_too_long() -> None:
    header = parts.MOST_HEADER // 3
    found = [place_of([(header, PAGE)] * 20, rank, 2) for rank in range(20)]
    assert {place.files for place in found} == {8}
    assert max(place.header_bytes for place in found) <= parts.MOST_HEADER


def test_one_large_file_is_as_much_work_as_many_small_ones() -> None:
    found = [Part("large", 0, 60 << 20, ""), *(Part(f"small {number}", 0, 1000, "") for number in range(60))]
    assert [len(own_parts(found, rank, 2)) for rank in range(2)] == [1, 60]
    assert max(len(own_parts(found, rank, 61)) for rank in range(61)) <= 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 64, 500])
def test_each_part_is_checked_by_one_rank_and_none_checks_many_more_than_another(ranks: int) -> None:
    found = [Part(f"file {number // 8}", number % 8, 1000 + number, "") for number in range(256)]
    found += [Part("empty", 0, 0, ""), Part("state.json", 0, 1, "")]
    own = [own_parts(found, rank, ranks) for rank in range(ranks)]
    assert [part for parts in own for part in parts] == found
    assert max(len(parts) for parts in own) <= 258 // ranks + 2


def test_as_many_ranks_as_files_check_one_file_each() -> None:
    found = [Part(f"file {number}", 0, 1000 + number % 3, "") for number in range(64)]
    assert [own_parts([*found, Part("state.json", 0, 100, "")], rank, 64)[0] for rank in range(64)] == found
