"""hpcgpt.tracking.missing_rows: a row is compared with the rollbacks before it, not with those of the last read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.tracking.missing_rows import RunRows


def add(folder: Path, name: str, *lines: dict[str, Any]) -> None:
    with (folder / name).open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def roll_back(folder: Path, to: int, at: float, event: str) -> None:
    """Cut metrics.jsonl off and record it, in the reporter's order."""
    path = folder / "metrics.jsonl"
    kept = path.read_text().splitlines(True)[:to] if path.exists() else []
    (folder / "new").write_text("".join(kept))
    os.replace(folder / "new", path)
    add(folder, "events.jsonl", {"event": event, "time": at, "step": to})


def rows(first: int, last: int, at: float) -> list[dict[str, Any]]:
    return [{"step": step, "time": at + step / 100, "train/loss": 1.0} for step in range(first, last + 1)]


def steps(found: Iterable[dict[str, Any]]) -> list[int]:
    """Return the steps of all lines but events."""
    return [row["step"] for row in found if "event" not in row]


@pytest.mark.parametrize("event", ["rollback", "went_back"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_rollback_between_two_reads_of_the_files_is_noticed(tmp_path: Path, name: str, event: str) -> None:
    """Rows that are made again while earlier ones are being sent are missing, though their steps have arrived."""
    run = RunRows(tmp_path)
    extra = {"text": "a"} if name == "samples.jsonl" else {}
    add(tmp_path, name, *[row | extra for row in rows(1, 4, 100.0)])
    assert steps(run.lacking()) == [1, 2, 3, 4]
    add(tmp_path, "metrics.jsonl", *rows(5, 5, 100.0))
    missing = run.lacking()
    assert next(missing)["step"] == 5
    roll_back(tmp_path, 2, at=200.0, event=event)
    add(tmp_path, name, *[row | extra for row in rows(3, 5, 201.0)])
    later = [*missing, *run.lacking()]
    assert steps(row for row in later if row["time"] > 200) == [3, 4, 5]
    assert run.has_obsolete
    assert steps(run.lacking()) == []


def test_a_row_from_before_a_rollback_that_has_arrived_is_not_sent_again(tmp_path: Path) -> None:
    """The rollback may be recorded after the rows were read and before the events are."""
    run = RunRows(tmp_path)
    for row in rows(1, 4, 100.0):
        run.rows.add(row["step"], row["time"])
    add(tmp_path, "metrics.jsonl", *rows(1, 4, 100.0))
    add(tmp_path, "events.jsonl", {"event": "rollback", "time": 200.0, "step": 2})
    assert steps(run.lacking()) == []
    add(tmp_path, "metrics.jsonl", *rows(3, 4, 201.0))
    assert steps(run.lacking()) == [3, 4]
    assert steps(run.lacking()) == []


def test_obsolete_rows_that_have_not_arrived_are_not_sent(tmp_path: Path) -> None:
    """The samples of a run are kept when it goes back; so may rows be that were read before."""
    add(tmp_path, "samples.jsonl", *[row | {"text": "a"} for row in rows(1, 4, 100.0)])
    add(tmp_path, "events.jsonl", {"event": "rollback", "time": 200.0, "step": 2})
    add(tmp_path, "samples.jsonl", *[row | {"text": "b"} for row in rows(3, 4, 201.0)])
    assert steps(RunRows(tmp_path).lacking()) == [1, 2, 3, 4]


@pytest.mark.parametrize("event", ["rollback", "went_back"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "ranks.jsonl"])
def test_lines_of_an_attempt_on_a_host_whose_clock_is_behind_are_sent(tmp_path: Path, name: str, event: str) -> None:
    """Its lines seem to be older than the rollback on another host; the attempt has started after it nevertheless."""
    kinds: dict[str, dict[str, Any]] = {"samples.jsonl": {"text": "a"}, "ranks.jsonl": {"local_s": [0.1]}}
    more = kinds.get(name, {})
    number: dict[str, Any] = {} if name == "samples.jsonl" else {"attempt": 3}
    back = {"event": event, "time": 1000.0, "step": 2, "attempt": 2}
    start = {"event": "start", "time": 900.0, "step": 2, "attempt": 3}
    add(tmp_path, "events.jsonl", {"event": "start", "time": 50.0, "step": 0, "attempt": 1}, back, start)
    add(tmp_path, name, *[row | more | number for row in rows(3, 5, 950.0)])
    run = RunRows(tmp_path)
    run.read_events()
    for row in rows(3, 5, 100.0):
        assert run.is_obsolete(row["step"], row["time"])
        run.note(name, row["step"], row["time"])
    assert steps(run.lacking()) == [3, 4, 5]
    assert steps(run.lacking()) == []
    for row in rows(3, 5, 950.0):
        assert not run.is_obsolete(row["step"], row["time"])


def test_rows_of_an_attempt_on_a_host_whose_clock_is_ahead_are_obsolete(tmp_path: Path) -> None:
    """Their times are after that at which the run went back, on another host; they are of the attempt before."""
    start = {"event": "start", "time": 300.0, "step": 2, "attempt": 3}
    back = {"event": "went_back", "time": 200.0, "step": 2, "attempt": 2}
    add(tmp_path, "events.jsonl", {"event": "start", "time": 50.0, "step": 0, "attempt": 1}, back, start)
    run = RunRows(tmp_path)
    run.read_events()
    assert run.is_obsolete(3, 250.0)
    assert not run.is_obsolete(3, 301.0)
    add(tmp_path, "metrics.jsonl", *[row | {"attempt": 1} for row in rows(1, 4, 350.0)])
    assert steps(run.lacking()) == [1, 2]


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([("start", 3, 2)], [1, 2]),
        ([("start", 3, 4)], [1, 2, 3, 4]),
        ([("start", 3, 3)], [1, 2, 3]),
        ([("start", 3, 2), ("start", 4, 4)], [1, 2, 3, 4]),
        ([("start", 3, 2), ("save", 3, 4), ("start", 4, 4)], [1, 2]),
        ([("start", 3, 2), ("save", 3, 3), ("start", 4, 4)], [1, 2, 3, 4]),
    ],
    ids=["made", "not made", "half made", "taken back later", "made and trained on", "taken back after a save"],
)
def test_checkpoints_that_were_not_set_aside_or_were_brought_back_keep_their_rows(
    tmp_path: Path, later: list[tuple[str, int, int]], expected: list[int]
) -> None:
    """The event comes first: a full disk may stop what it announces. A later start shows what has become of it."""
    add(tmp_path, "events.jsonl", {"event": "start", "time": 50.0, "step": 0, "attempt": 1},
        {"event": "save", "time": 104.0, "step": 4, "attempt": 1},
        {"event": "went_back", "time": 200.0, "step": 2, "attempt": 2},
        *[{"event": event, "time": 300.0 + number, "step": step, "attempt": attempt}
          for number, (event, attempt, step) in enumerate(later)])  # fmt: skip
    add(tmp_path, "metrics.jsonl", *[row | {"attempt": 1} for row in rows(1, 4, 100.0)])
    assert steps(RunRows(tmp_path).lacking()) == expected


def test_a_damaged_time_of_an_event_does_not_hold_back_those_after_it(tmp_path: Path) -> None:
    add(tmp_path, "metrics.jsonl", *rows(1, 2, 100.0))
    add(tmp_path, "events.jsonl", {"event": "odd", "time": float("nan")}, {"event": "crash", "time": 300.0})
    assert [line["event"] for line in RunRows(tmp_path).lacking() if "event" in line] == ["crash"]


@pytest.mark.parametrize(("settings", "repeats"), [("a", True), ("b", False), (None, True)])
def test_a_start_with_other_settings_makes_rows_of_earlier_attempts_obsolete(
    tmp_path: Path, settings: str | None, repeats: bool
) -> None:
    """With the same settings it repeats them, so they need not be sent again. Of an older version none are known."""
    run = RunRows(tmp_path)
    add(tmp_path, "events.jsonl", {"event": "start", "time": 50.0, "step": 0, "attempt": 1, "settings": "a"})
    add(tmp_path, "metrics.jsonl", *[row | {"attempt": 1} for row in rows(1, 5, 100.0)])
    assert steps(run.lacking()) == [1, 2, 3, 4, 5]
    (tmp_path / "metrics.jsonl").unlink()
    add(tmp_path, "events.jsonl", {"event": "start", "time": 200.0, "step": 2, "attempt": 2, "settings": settings})
    add(tmp_path, "metrics.jsonl", *[row | {"attempt": 1} for row in rows(1, 2, 100.0)],
        *[row | {"attempt": 2} for row in rows(3, 6, 201.0)])  # fmt: skip
    assert steps(run.lacking()) == ([6] if repeats else [3, 4, 5, 6])
    assert run.has_obsolete != repeats
    assert run.is_obsolete(3, 100.03, 1) != repeats
    assert not run.is_obsolete(3, 201.03, 2)


def test_an_event_comes_between_the_rows_it_lies_between_with_their_step_and_loss(tmp_path: Path) -> None:
    add(tmp_path, "metrics.jsonl", *[row | {"train/loss": 9.0 - row["step"]} for row in rows(1, 4, 100.0)])
    add(tmp_path, "events.jsonl", {"event": "crash", "time": 100.025}, {"event": "damaged"}, {"event": 3, "time": 1})
    found = list(RunRows(tmp_path).lacking())
    assert [row.get("event", row["step"]) for row in found] == [1, 2, "crash", 3, 4]
    assert (found[2]["step"], found[2]["loss_before"]) == (2, 7.0)
    again = RunRows(tmp_path)
    again.note("events.jsonl", 2, 100.025)
    assert [row for row in again.lacking() if "event" in row] == []
