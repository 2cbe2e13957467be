"""data_prep.pipeline.dedup: the ranges of hashes that are compared one at a time."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.pipeline import dedup
from data_prep.pipeline.unit import DOCUMENT


def written(folder: Path, tables: Sequence[np.ndarray[Any, Any]]) -> list[Path]:
    paths = [folder / f"{number}.documents" for number in range(len(tables))]
    for path, table in zip(paths, tables, strict=True):
        table.tofile(path)
    return paths


def test_each_row_is_in_the_range_of_its_hash_and_a_table_is_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search in a column of rows copies it, so one for each border would grow with the square of the documents."""
    chance = np.random.default_rng(1)
    tables = []
    for rows in (700, 0, 1, 400):
        table = np.zeros(rows, dtype=DOCUMENT)
        table["high"] = np.sort(chance.integers(0, 2**64, rows, dtype=np.uint64))
        tables.append(table)
    tables[0]["high"][:2], tables[0]["high"][-1] = 0, 2**64 - 1
    searches = 0
    real = np.searchsorted

    def counted(*given: Any, **named: Any) -> Any:
        nonlocal searches
        searches += 1
        return real(*given, **named)

    monkeypatch.setattr(np, "searchsorted", counted)
    monkeypatch.setattr(dedup, "ROWS_AT_ONCE", 100)
    found = list(dedup._hash_ranges(written(tmp_path, tables), 1101))
    assert len(found) == 12
    for number, parts in enumerate(found):
        first, last = 2**64 * number // 12, 2**64 * (number + 1) // 12 - 1
        for part, table in zip(parts, tables, strict=True):
            inside = (table["high"] >= np.uint64(first)) & (table["high"] <= np.uint64(last))
            assert part.tolist() == table[inside].tolist()
    assert searches <= len(tables)


def test_few_rows_are_one_range(tmp_path: Path) -> None:
    tables = [*written(tmp_path, [np.zeros(3, dtype=DOCUMENT), np.zeros(0, dtype=DOCUMENT)]), tmp_path / "absent"]
    assert [[len(part) for part in parts] for parts in dedup._hash_ranges(tables, 3)] == [[3, 0, 0]]


def test_there_may_be_more_tables_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    """A unit has one, of at most 256 MB of text; the limit is often 1,024."""
    tables = written(tmp_path, [np.zeros(2, dtype=DOCUMENT)] * 100)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
    try:
        (parts,) = dedup._hash_ranges(tables, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [len(part) for part in parts] == [2] * 100
