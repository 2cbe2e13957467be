"""hpcgpt.tracking.missing_rows: a row is compared with the rollbacks before it, not with those of the last read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.tracking.missing_rows import RunRows


def add(folder: Path, name: str, *lines: dict[str, Any]) -> None:
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def roll_back(folder: Path, to: int, at: float) -> None:
    """Cut metrics.jsonl off and record it, in the reporter's order."""
    path = folder / "metrics.jsonl"
    kept = path.read_text().splitlines(True)[:to] if path.exists() else []
    (folder / "new").write_text("".join(kept))
    os.replace(folder / "new", path)
    add(folder, "events.jsonl", {"event": "rollback", "time": at, "step": to})


def rows(first: int, last: int, at: float) -> list[dict[str, Any]]:
    return [{"step": step, "time": at + step / 100, "train/loss": 1.0} for step in range(first, last + 1)]


def steps(found: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in found]


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_rollback_between_two_reads_of_the_files_is_noticed(tmp_path: Path, name: str) -> None:
    """Rows that are made again while earlier ones are being sent are missing, though their steps have arrived."""
    run = RunRows(tmp_path)
    extra = {"text": "a"} if name == "samples.jsonl" else {}
    add(tmp_path, name, *[row | extra for row in rows(1, 4, 100.0)])
    assert steps(list(run.lacking())) == [1, 2, 3, 4]
    add(tmp_path, "metrics.jsonl", *rows(5, 5, 100.0))
    missing = run.lacking()
    assert next(missing)["step"] == 5
    roll_back(tmp_path, 2, at=200.0)
    add(tmp_path, name, *[row | extra for row in rows(3, 5, 201.0)])
    later = [*missing, *run.lacking()]
    assert [row["step"] for row in later if row["time"] > 200] == [3, 4, 5]
    assert list(run.lacking()) == []


def test_a_row_from_before_a_rollback_that_has_arrived_is_not_sent_again(tmp_path: Path) -> None:
    """The rollback may be recorded after the rows were read and before the events are."""
    run = RunRows(tmp_path)
    for row in rows(1, 4, 100.0):
        run.rows.add(row["step"], row["time"])
    add(tmp_path, "metrics.jsonl", *rows(1, 4, 100.0))
    add(tmp_path, "events.jsonl", {"event": "rollback", "time": 200.0, "step": 2})
    assert list(run.lacking()) == []
    add(tmp_path, "metrics.jsonl", *rows(3, 4, 201.0))
    assert steps(list(run.lacking())) == [3, 4]
    assert list(run.lacking()) == []
