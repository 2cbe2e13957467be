"""Finds rows of metrics.jsonl by their step, without reading the file: a run of ten million steps has three gigabytes.

Rows are in the order of their steps, so the place of a step is found by bisection. Damaged lines are passed over.

No torch in here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from hpcgpt.run import records


def first_from(file: BinaryIO, step: int) -> int:
    """Return where the first row of this step, or of a later one, begins; the size of the file if there is none."""
    low, high = 0, os.fstat(file.fileno()).st_size
    answer = high
    while low < high:
        middle = (low + high) // 2
        found = _next_row(file, middle, high)
        if found is None:
            high = middle
        elif found[2] < step:
            low = found[1]
        else:
            high, answer = middle, found[0]
    return answer


def row_of(path: Path, step: int) -> dict[str, Any]:
    """Return the row of a step, {} if there is none.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        file.seek(first_from(file, step))
        row = records.parsed(file.readline())
    return row if row.get("step") == step else {}


def _next_row(file: BinaryIO, start: int, end: int) -> tuple[int, int, int] | None:
    """Return where the first sound row that begins from `start` to before `end` begins and ends, and its step."""
    file.seek(max(0, start - 1))
    at = start - 1 + len(file.readline()) if start else 0
    while at < end:
        line = file.readline()
        step: Any = records.parsed(line).get("step")
        if records.is_count(step):
            return at, at + len(line), step
        at += len(line)
    return None
