"""Remove exact duplicates: of equal texts only the first is kept, in the order of the inputs.

Each unit has written the hashes of its documents, sorted (``prep/units/N/train.documents``). They are compared over all
units, one range of hashes at a time. So memory is bounded: 100 bytes for each of ROWS_AT_ONCE documents, and one byte
for each document of the corpus. Then the shards that hold duplicates are written again without them.

Two texts count as equal if their XXH3-128 hashes are. Among 10**10 different documents, the probability of one false
pair is 10**-19.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.pipeline import unit
from data_prep.pipeline.unit import DOCUMENT, UnitRecord
from hpcgpt.data import shard_format, shard_reader, shard_writer
from hpcgpt.data.shard_format import Shard, Width
from hpcgpt.storage import atomic

ROWS_AT_ONCE = 4_000_000
CHUNK_TOKENS = 16_000_000
_FILE = "deduplicated.json"


def remove(out: Path, records: list[UnitRecord], width: Width) -> tuple[list[list[Shard]], int]:
    """Remove duplicates; return the remaining shards of each unit, and the number of removed documents. Restartable."""
    for number in range(len(records)):
        for left in unit.folder(out, number).glob(".kept_*.tmp"):  # of a process that was killed in here
            left.unlink(missing_ok=True)
    removed = 0
    made: list[list[Shard]] = [[] for _ in records]
    duplicates = {split: _find_duplicates(out, records, split) for split in ("train", "val")}
    for number, record in enumerate(records):
        path = unit.folder(out, number) / _FILE
        if not path.exists():
            kept = _without_duplicates(unit.folder(out, number), record, number, duplicates, width)
            atomic.write(path, json.dumps([asdict(shard) for shard in kept]).encode())
        made[number] = [Shard(**row) for row in json.loads(path.read_bytes())]
        removed += sum(s.documents for s in record.shards) - sum(s.documents for s in made[number])
        _remove_replaced(unit.folder(out, number), record, made[number])
    return made, removed


@dataclass(frozen=True)
class _Duplicates:
    """For each document of a split, over all units, whether it is a duplicate of an earlier one.

    The documents of unit n are those from `starts[n]` to `starts[n + 1]`.
    """

    starts: NDArray[np.int64]
    is_duplicate: NDArray[np.bool_]

    def of_unit(self, number: int) -> NDArray[np.bool_]:
        return self.is_duplicate[self.starts[number] : self.starts[number + 1]]


def _find_duplicates(out: Path, records: list[UnitRecord], split: str) -> _Duplicates:
    tables = [unit.folder(out, number) / f"{split}.documents" for number in range(len(records))]
    starts = np.concatenate([[0], np.cumsum([_row_count(table) for table in tables])]).astype(np.int64)
    is_duplicate = np.zeros(starts[-1], dtype=bool)
    for parts in _hash_ranges(tables, int(starts[-1])):
        # The rows are in the order of the units and the sort is stable: of equal hashes the first document comes first.
        rows = np.concatenate(parts)
        numbers = np.repeat(starts[:-1], [len(part) for part in parts]) + rows["number"]
        order = np.lexsort((rows["low"], rows["high"]))
        rows, numbers = rows[order], numbers[order]
        equals_previous = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        is_duplicate[numbers[1:][equals_previous]] = True
    return _Duplicates(starts, is_duplicate)


def _row_count(table: Path) -> int:
    return table.stat().st_size // DOCUMENT.itemsize if table.exists() else 0


def _read_rows(table: Path, first: int = 0, end: int | None = None) -> NDArray[Any]:
    end = _row_count(table) if end is None else end
    if first == end:
        return np.zeros(0, dtype=DOCUMENT)
    return np.fromfile(table, DOCUMENT, end - first, offset=first * DOCUMENT.itemsize)


def _hash_ranges(tables: list[Path], total: int) -> Iterator[list[NDArray[Any]]]:
    """Yield the rows of all tables, one of several equal ranges of hashes at a time.

    One table is open at a time: there may be more of them than a process may have open files.
    """
    count = -(-total // ROWS_AT_ONCE)
    borders = np.array([2**64 * n // count for n in range(1, count)], dtype=np.uint64)
    # Of each table, where the ranges begin and end. A column of these rows is not aligned: searchsorted would copy it
    # at every call, so it is copied once and searched once.
    cuts = []
    for table in tables:
        high = _read_rows(table)["high"].copy()
        cuts.append([0, *np.searchsorted(high, borders).tolist(), len(high)])
    for number in range(max(1, count)):
        yield [_read_rows(table, cut[number], cut[number + 1]) for table, cut in zip(tables, cuts, strict=True)]


def _without_duplicates(
    folder: Path, record: UnitRecord, number: int, duplicates: dict[str, _Duplicates], width: Width
) -> Iterator[Shard]:
    """Yield the unit's shards; those with duplicates are written again without them, as ``kept_...``."""
    done = {"train": 0, "val": 0}
    for shard in record.shards:
        first = done[shard.split]
        done[shard.split] += shard.documents
        drop = duplicates[shard.split].of_unit(number)[first : first + shard.documents]
        if not drop.any():
            yield shard
        elif not drop.all():
            sizes = np.zeros(shard.documents, dtype=DOCUMENT)
            rows = _read_rows(folder / f"{shard.split}.documents")
            inside = (rows["number"] >= first) & (rows["number"] < first + shard.documents)
            sizes[rows["number"][inside] - first] = rows[inside]
            yield _rewrite(folder, shard, ~drop, sizes, width)


def _rewrite(folder: Path, shard: Shard, keep: NDArray[np.bool_], sizes: NDArray[Any], width: Width) -> Shard:
    tokens = shard_reader.open_tokens(folder / f"{shard.name}.bin")
    lengths = shard_format.document_lengths((folder / f"{shard.name}.idx").read_bytes())
    ends = np.cumsum(lengths)
    with shard_writer.writing(folder, f"kept_{shard.name}", shard.split, width) as writer:
        first = 0
        while first < len(lengths):
            start = int(ends[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(ends, start + CHUNK_TOKENS, side="right")))
            chunk = slice(first, last)
            is_kept = np.repeat(keep[chunk], lengths[chunk])  # of each token
            kept = sizes[chunk][keep[chunk]]
            writer.add(
                tokens[start : int(ends[last - 1])][is_kept],
                lengths[chunk][keep[chunk]],
                int(kept["characters"].sum(dtype=np.int64)),
                int(kept["text_bytes"].sum(dtype=np.int64)),
            )
            first = last
    assert writer.shard is not None
    return writer.shard


def _remove_replaced(folder: Path, record: UnitRecord, made: list[Shard]) -> None:
    """Remove shards that were written again, or held only duplicates."""
    for name in {shard.name for shard in record.shards} - {shard.name for shard in made}:
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def names(record: UnitRecord) -> list[str]:
    """Return the names of the files that deduplication leaves in a unit's folder."""
    return [_FILE, *sorted({f"{shard.split}.documents" for shard in record.shards})]
