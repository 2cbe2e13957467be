"""Exact duplicates: of equal texts only the first stays, in the order of the inputs.

Each unit has written the hash of every document, sorted (``prep/units/N/train.documents``). Here they
are compared over all units, a range of hashes at a time, so memory is bounded: about ROWS_AT_ONCE
documents at 100 bytes, and one byte for each document of the corpus. Then the shards that hold
duplicates are written again without them.

Two texts count as equal if their XXH3-128 is: among 10**10 different documents the chance of one false
pair is 10**-19.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.pipeline import unit
from data_prep.pipeline.unit import DOCUMENT, Record
from hpcgpt.data import shard_format, shard_reader, shard_writer
from hpcgpt.data.shard_format import Shard, Width
from hpcgpt.storage import atomic

ROWS_AT_ONCE = 4_000_000
CHUNK_TOKENS = 16_000_000
_FILE = "deduplicated.json"


def remove(out: Path, records: list[Record], width: Width) -> tuple[list[list[Shard]], int]:
    """The shards of each unit without duplicates, and how many documents were left out. Restartable."""
    removed = 0
    made: list[list[Shard]] = [[] for _ in records]
    drops = {split: _drops(out, records, split) for split in ("train", "val")}
    for number, record in enumerate(records):
        path = unit.folder(out, number) / _FILE
        if not path.exists():
            rows = [asdict(shard) for shard in _without(unit.folder(out, number), record, number, drops, width)]
            atomic.write(path, json.dumps(rows).encode())
        made[number] = [Shard(**row) for row in json.loads(path.read_bytes())]
        removed += sum(s.documents for s in record.shards) - sum(s.documents for s in made[number])
        _remove_replaced(unit.folder(out, number), record, made[number])
    return made, removed


@dataclass(frozen=True)
class _Drops:
    """Of each document of a split, over all units: is it a duplicate of an earlier one?"""

    starts: NDArray[np.int64]
    marks: NDArray[np.bool_]

    def of(self, number: int) -> NDArray[np.bool_]:
        return self.marks[self.starts[number] : self.starts[number + 1]]


def _drops(out: Path, records: list[Record], split: str) -> _Drops:
    tables = [_table(unit.folder(out, number) / f"{split}.documents") for number in range(len(records))]
    starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])]).astype(np.int64)
    marks = np.zeros(starts[-1], dtype=bool)
    for parts in _ranges(tables, int(starts[-1])):
        # In the order of the units, and a stable sort: of equal hashes the first document comes first.
        rows = np.concatenate(parts)
        places = np.repeat(starts[:-1], [len(part) for part in parts]) + rows["number"]
        order = np.lexsort((rows["low"], rows["high"]))
        rows, places = rows[order], places[order]
        again = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
        marks[places[1:][again]] = True
    return _Drops(starts, marks)


def _table(path: Path) -> NDArray[Any]:
    if not path.exists() or not path.stat().st_size:
        return np.zeros(0, dtype=DOCUMENT)
    return np.memmap(path, dtype=DOCUMENT, mode="r")


def _ranges(tables: list[NDArray[Any]], total: int) -> Iterator[list[NDArray[Any]]]:
    """The rows of all tables, an equal range of hashes at a time."""
    count = -(-total // ROWS_AT_ONCE)
    borders = [(2**64 * n // count) for n in range(1, count)]
    places = [[0] * len(tables)]
    places += [[int(np.searchsorted(table["high"], np.uint64(border))) for table in tables] for border in borders]
    places += [[len(table) for table in tables]]
    for start, stop in pairwise(places):
        yield [table[a:b] for table, a, b in zip(tables, start, stop, strict=True)]


def _without(folder: Path, record: Record, number: int, drops: dict[str, _Drops], width: Width) -> Iterator[Shard]:
    """The unit's shards, those with duplicates written again as ``kept_...``."""
    done = {"train": 0, "val": 0}
    for shard in record.shards:
        first = done[shard.split]
        done[shard.split] += shard.documents
        drop = drops[shard.split].of(number)[first : first + shard.documents]
        if not drop.any():
            yield shard
        elif not drop.all():
            sizes = np.zeros(shard.documents, dtype=DOCUMENT)
            rows = _table(folder / f"{shard.split}.documents")
            inside = (rows["number"] >= first) & (rows["number"] < first + shard.documents)
            sizes[rows["number"][inside] - first] = rows[inside]
            yield _kept(folder, shard, ~drop, sizes, width)


def _kept(folder: Path, shard: Shard, keep: NDArray[np.bool_], sizes: NDArray[Any], width: Width) -> Shard:
    tokens = shard_reader.open_tokens(folder / f"{shard.name}.bin")
    lengths = shard_format.document_lengths((folder / f"{shard.name}.idx").read_bytes())
    ends = np.cumsum(lengths)
    with shard_writer.writing(folder, f"kept_{shard.name}", shard.split, width) as writer:
        first = 0
        while first < len(lengths):
            start = int(ends[first] - lengths[first])
            last = max(first + 1, int(np.searchsorted(ends, start + CHUNK_TOKENS, side="right")))
            part = slice(first, last)
            chosen = np.repeat(keep[part], lengths[part])
            kept = sizes[part][keep[part]]
            writer.add(
                tokens[start : int(ends[last - 1])][chosen],
                lengths[part][keep[part]],
                int(kept["characters"].sum(dtype=np.int64)),
                int(kept["text_bytes"].sum(dtype=np.int64)),
            )
            first = last
    assert writer.shard is not None
    return writer.shard


def _remove_replaced(folder: Path, record: Record, made: list[Shard]) -> None:
    """The shards that were written again, or hold nothing but duplicates, are not needed any more."""
    for name in {shard.name for shard in record.shards} - {shard.name for shard in made}:
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").unlink(missing_ok=True)


def names(record: Record) -> list[str]:
    """The files that this module leaves in a unit's folder."""
    return [_FILE, *sorted({f"{shard.split}.documents" for shard in record.shards})]
