"""metrics.blocks: the rows of a long run as blocks, a hundredth of the size of metrics.jsonl.

A block is up to WIDTH consecutive steps of one attempt: the extremes, sums and counts of the figures that reports show,
and what goodput is computed from. The file is a header (`HEADER`) and records of BLOCK, little-endian. Each has the
place in metrics.jsonl where its rows end, so the rows of every block can be found, and those after the last one. A row
is alone in its block if it is the first of its attempt, has an evaluation, or follows one.

It is derived: rank 0 makes it from the bytes of metrics.jsonl, as rows are added (hpcgpt.run.blocks_file), and it may
be deleted at any time. It is never used unchecked: `sound` compares PROBES blocks, the first and the last among them,
with their rows. What it lacks is read from metrics.jsonl, row by row, in bounded memory. A run whose metrics.jsonl has
at most WHOLE_BYTES has no such file, and its rows are read.

No torch in here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpcgpt.run import records
from hpcgpt.run.records import Record

CURVES = ("train/loss", "val/loss", "train/lr", "train/grad_norm", "train/tokens_per_s")
FIELDS = ("step", "time", "attempt", "tokens", "train/step_s", "val/elapsed_s", *CURVES)
CURVE = np.dtype([("low", "<f8"), ("high", "<f8"), ("total", "<f8"), ("count", "<i8")])
# `end`: where its last row ends in metrics.jsonl. `time`, `tokens`: of the last row. `attempt`: -1 if it is not known.
# `step_s`: of all steps together, without overlaps; `val_s`: of its evaluation. NaN where nothing is known.
BLOCK = np.dtype([
    ("end", "<i8"), ("first", "<i8"), ("last", "<i8"), ("rows", "<i8"), ("attempt", "<i8"), ("time", "<f8"),
    ("step_s", "<f8"), ("val_s", "<f8"), ("tokens", "<f8"), *((name, CURVE) for name in CURVES),
])  # fmt: skip
WIDTH = 64
WHOLE_BYTES = 16 << 20
FILE_NAME = "metrics.blocks"
HEADER_BYTES = 4096
_ABOUT = {"format": "hpcgpt metrics.blocks", "version": 1, "width": WIDTH, "record": BLOCK.itemsize}
HEADER = (json.dumps(_ABOUT) + "\n").encode().ljust(HEADER_BYTES, b"\0")
PROBES = 32
AT_A_TIME = 16_384  # blocks
LONGEST_BLOCK = 4 << 20  # bytes of rows, lines that are no rows among them

Blocks = NDArray[Any]  # of BLOCK
Integers = NDArray[np.int64]
NONE: Integers = np.array([], dtype=np.int64)


def parts(folder: Path, borders: Integers = NONE) -> Iterator[Blocks]:
    """Yield the blocks of a run, in the order of their steps; of a short run, a block for each row.

    A block that has one of the steps `borders`, which are sorted, before its last is divided into its rows.
    """
    try:
        file = open(folder / "metrics.jsonl", "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        size, before = os.fstat(file.fileno()).st_size, None
        if size > WHOLE_BYTES:
            for found in _stored(folder / FILE_NAME, file, size):
                yield _divided(found, before, borders, file)
                before = found[-1]
        newest = records.newest_rows(folder)[-records.LAST_ROWS :]
        highest = max((row["step"] for row in newest), default=0)
        at = int(before["end"]) if before is not None else 0
        while True:
            begin = at
            units, at = read_rows(file, at, records.BLOCK_BYTES, before, highest)
            if len(units):
                yield units if size <= WHOLE_BYTES else joined(units, before, borders, WIDTH)
                before = units[-1]
            if at == begin:
                return


def read_rows(
    file: BinaryIO, at: int, length: int, before: np.void | None = None, highest: int = records.LARGEST
) -> tuple[Blocks, int]:
    """Read the rows in about `length` bytes from `at` on: a block for each, and where they end.

    Steps increase, as they do in every metrics.jsonl: a row whose step does not, or is above `highest`, is damaged, and
    left out.
    """
    file.seek(at)
    rows: list[Record] = []
    ends: list[int] = []
    last = int(before["last"]) if before is not None else -1
    for line in file.readlines(length):
        at += len(line)
        row = records.row_of(line, FIELDS)
        if row and last < row["step"] <= highest:
            last = row["step"]
            rows.append(row)
            ends.append(at)
    return of_rows(rows, ends), at


def of_rows(rows: Sequence[Record], ends: Sequence[int] = ()) -> Blocks:
    """Make a block of each row; `ends`: where each ends in metrics.jsonl."""
    made = np.zeros(len(rows), BLOCK)
    made["end"] = ends if len(ends) else 0
    made["first"] = made["last"] = [row["step"] for row in rows]
    made["rows"] = 1
    made["attempt"] = [row.get("attempt", -1) for row in rows]
    for name, key in (("time", "time"), ("step_s", "train/step_s"), ("val_s", "val/elapsed_s"), ("tokens", "tokens")):
        made[name] = [row.get(key, np.nan) for row in rows]
    for name in CURVES:
        values = np.array([row.get(name, np.nan) for row in rows], dtype=np.float64)
        known = np.isfinite(values)
        curve = made[name]
        curve["low"] = curve["high"] = values
        curve["total"], curve["count"] = np.where(known, values, 0.0), known
    return made


def joined(blocks: Blocks, before: np.void | None, borders: Integers = NONE, width: int | None = None) -> Blocks:
    """Join neighbours of one attempt, but not over an evaluation, or a step in `borders` or divisible by `width`.

    The first block of an attempt, one with an evaluation, and one after that stay alone. `before` is the block before
    the first one.
    """
    if not len(blocks):
        return blocks
    blocks = without_overlaps(blocks, before)
    new = ~joins(blocks, before)
    last = _shifted(blocks["last"], before["last"] if before is not None else -1)
    if width is not None:
        new |= (blocks["last"] - 1) // width != (last - 1) // width
    if len(borders):
        new |= borders[np.minimum(np.searchsorted(borders, last), len(borders) - 1)] == last
    new[0] = True
    return _merged(blocks, np.flatnonzero(new))


def joins(blocks: Blocks, before: np.void | None) -> NDArray[np.bool_]:
    """Return which blocks may be joined to the block before them."""
    same, evaluated = _same_attempt(blocks, before), np.isfinite(blocks["val_s"])
    evaluated_before = _shifted(evaluated, before is not None and bool(np.isfinite(before["val_s"])))
    later = blocks["time"] > _shifted(blocks["time"], before["time"] if before is not None else np.nan)
    # The block before must not be the first of its attempt. What `before` is, is not known: it is never joined to.
    open_ = _shifted(same & ~evaluated & ~evaluated_before, False)
    return np.asarray(open_ & same & ~evaluated & later)


def without_overlaps(blocks: Blocks, before: np.void | None) -> Blocks:
    """Return the blocks without the time that the block before took already: clocks differ by milliseconds."""
    since = blocks["time"] - _shifted(blocks["time"], before["time"] if before is not None else np.nan)
    cut = blocks.copy()
    cut["step_s"] = np.where(
        _same_attempt(blocks, before), np.minimum(blocks["step_s"], np.maximum(since, 0.0)), blocks["step_s"]
    )
    return cut


def _same_attempt(blocks: Blocks, before: np.void | None) -> NDArray[np.bool_]:
    return np.asarray(blocks["attempt"] == _shifted(blocks["attempt"], before["attempt"] if before is not None else -2))


def _shifted(values: NDArray[Any], first: Any) -> NDArray[Any]:
    """Return for each value the one before it; `first` for the first."""
    return np.concatenate([np.array([first], dtype=values.dtype), values[:-1]])


def _merged(blocks: Blocks, starts: Integers) -> Blocks:
    """Make one block of the blocks from each start to the next."""
    ends = np.append(starts[1:], len(blocks)) - 1
    made: Blocks = blocks[ends].copy()
    for name in ("first", "attempt", "val_s"):
        made[name] = blocks[name][starts]
    made["rows"] = np.add.reduceat(blocks["rows"], starts)
    known = np.isfinite(blocks["step_s"])
    total = np.add.reduceat(np.where(known, blocks["step_s"], 0.0), starts)
    made["step_s"] = np.where(np.add.reduceat(known, starts, dtype=np.int64) > 0, total, np.nan)
    for name in CURVES:
        old, new = blocks[name], made[name]
        new["low"], new["high"] = np.fmin.reduceat(old["low"], starts), np.fmax.reduceat(old["high"], starts)
        new["total"], new["count"] = np.add.reduceat(old["total"], starts), np.add.reduceat(old["count"], starts)
    return made


# --- the file --------------------------------------------------------------------------------------


def sound(stored: BinaryIO, rows: BinaryIO, size: int) -> int:
    """Return how many blocks of a file, from its first on, agree with a metrics.jsonl of `size` bytes."""
    stored.seek(0)
    if stored.read(HEADER_BYTES) != HEADER:
        return 0
    count, end, last = 0, 0, -1
    while len(found := read_blocks(stored, count, AT_A_TIME)):
        good = (found["end"] > _shifted(found["end"], end)) & (found["end"] <= size)
        good &= (found["first"] > _shifted(found["last"], last)) & (found["last"] >= found["first"])
        wrong = np.flatnonzero(~good)
        count += int(wrong[0]) if len(wrong) else len(found)
        if len(wrong):
            break
        end, last = int(found["end"][-1]), int(found["last"][-1])
    agreeing = 0
    for number in np.unique(np.linspace(0, count - 1, PROBES).round().astype(int)) if count else ():
        if not _agrees(stored, rows, int(number)):
            return agreeing
        agreeing = int(number) + 1
    return agreeing


def read_blocks(stored: BinaryIO, first: int, count: int) -> Blocks:
    """Read some blocks; fewer, if the file ends before."""
    stored.seek(HEADER_BYTES + first * BLOCK.itemsize)
    content = stored.read(count * BLOCK.itemsize)
    return np.frombuffer(content[: len(content) // BLOCK.itemsize * BLOCK.itemsize], BLOCK)


def _agrees(stored: BinaryIO, rows: BinaryIO, number: int) -> bool:
    """Is a block what its rows yield?"""
    found = read_blocks(stored, max(0, number - 1), 1 + min(1, number))
    before = found[0] if number else None
    made = joined(_rows_of(rows, found[-1], before), before, width=WIDTH)
    return len(made) == 1 and made[0].tobytes() == found[-1].tobytes()


def _rows_of(rows: BinaryIO, block: np.void, before: np.void | None) -> Blocks:
    """Read the rows of a block."""
    begin, end = int(before["end"]) if before is not None else 0, int(block["end"])
    if end - begin > LONGEST_BLOCK:
        return of_rows([])
    found = read_rows(rows, begin, end - begin, before, int(block["last"]))[0]
    return found[found["end"] <= end]


def _stored(path: Path, rows: BinaryIO, size: int) -> Iterator[Blocks]:
    """Yield the blocks of a file that agree with the rows."""
    try:
        stored = open(path, "rb")  # noqa: SIM115
    except OSError:  # missing, or unreadable: the rows are read
        return
    with stored:
        count, first = sound(stored, rows, size), 0
        # Fewer, if they have been cut off meanwhile.
        while len(found := read_blocks(stored, first, min(AT_A_TIME, count - first))):
            yield found
            first += len(found)


def _divided(blocks: Blocks, before: np.void | None, borders: Integers, rows: BinaryIO) -> Blocks:
    """Divide the blocks that have one of these steps before their last into rows."""
    borders = borders[borders <= blocks["last"][-1]]
    at = np.searchsorted(blocks["last"], borders)
    chosen = np.unique(at[(blocks["first"][at] <= borders) & (borders < blocks["last"][at])])
    made, done = [], 0
    for number in chosen.tolist():
        found = _rows_of(rows, blocks[number], blocks[number - 1] if number else before)
        if len(found):
            made += [blocks[done:number], found]
            done = number + 1
    return np.concatenate([*made, blocks[done:]]) if made else blocks
