"""hpcgpt/estimate/probe/pace.py: what made records say about steps, evaluations, saves and starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.estimate.probe import pace
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.run import records

START = 1000.0


class Records:
    """Rows and events of a run, written as if time passed."""

    def __init__(self) -> None:
        self.now, self.step, self.attempt = START, 0, 1
        self.rows: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.now, self.step = self.now + seconds, self.step + 1
            row = {"step": self.step, "time": self.now, "attempt": self.attempt, "tokens": 100 * self.step}
            self.rows.append(row | {"train/step_s": seconds})

    def evaluate(self, seconds: float, sample_s: float = 0.0) -> None:
        self.rows[-1]["val/elapsed_s"] = seconds
        self.now += seconds + sample_s

    def event(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, "time": self.now, "attempt": self.attempt, "step": self.step, **fields})

    def read(self, folder: Path) -> Pace:
        for name, lines in (("metrics", self.rows), ("events", self.events)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return pace.read(folder)


@pytest.fixture
def made() -> Records:
    return Records()


def test_steady_steps_are_those_after_the_first_without_evaluation_or_save(made: Records, tmp_path: Path) -> None:
    made.steps(1, 50.0)  # compiles
    made.steps(1, 9.0)
    made.steps(6, 2.0)
    made.evaluate(30.0)
    made.steps(6, 2.0)
    found = made.read(tmp_path)
    assert (found.steps, found.step_s, found.tokens_per_s) == (11, 2.0, 50.0)


def test_what_happens_between_steps_counts(made: Records, tmp_path: Path) -> None:
    made.steps(2, 2.0)
    for _ in range(5):
        made.now += 1.0
        made.steps(1, 2.0)
    assert made.read(tmp_path).step_s == 3.0


def test_an_evaluation_counts_with_its_sample_and_without_the_first_which_compiles(
    made: Records, tmp_path: Path
) -> None:
    for seconds in (40.0, 5.0, 7.0):
        made.steps(5, 2.0)
        made.evaluate(seconds, sample_s=1.0)
    made.steps(2, 2.0)
    assert made.read(tmp_path).eval_s == pytest.approx(7.0)  # median of 6 and 8


def test_a_single_evaluation_counts(made: Records, tmp_path: Path) -> None:
    made.steps(8, 2.0)
    made.evaluate(5.0)
    assert made.read(tmp_path).eval_s == 5.0


def test_a_save_costs_what_training_waits_for_and_what_it_slows_down(made: Records, tmp_path: Path) -> None:
    made.steps(8, 2.0)
    began_at = made.now
    made.now += 0.5  # the copy
    made.steps(3, 3.0)
    made.event("save", seconds=made.now - began_at, stall_s=0.5)
    made.steps(5, 2.0)
    made.event("save", seconds=4.0, stall_s=4.0)  # the last one, after the last step
    made.events[-1]["time"] += 4.5
    found = made.read(tmp_path)
    assert found.steps == 11
    assert found.step_s == 2.0
    assert found.stall_s == pytest.approx(3.5)
    assert found.save_s == pytest.approx((9.5 + 4.0) / 2)


def test_a_save_at_an_evaluation_costs_what_it_reports(made: Records, tmp_path: Path) -> None:
    """What the steps beside it take longer cannot be separated from the evaluation."""
    made.steps(8, 2.0)
    made.evaluate(10.0)
    made.steps(1, 2.0)
    made.event("save", seconds=1.9, stall_s=0.25)
    made.event("save_stall", stall_s=0.5)
    made.steps(4, 2.0)
    found = made.read(tmp_path)
    assert found.stall_s == 0.75
    assert found.eval_s == 10.0


def test_a_start_is_its_parts_and_the_first_steps(made: Records, tmp_path: Path) -> None:
    made.event("ready", imports_s=3.0, meet_s=1.0, warm_up_s=20.0, load_s=0.5)
    made.steps(1, 7.0)
    made.steps(6, 2.0)
    assert made.read(tmp_path).start_s == pytest.approx(24.5 + 5.0)


def test_attempts_are_not_compared_across_their_ends(made: Records, tmp_path: Path) -> None:
    made.steps(6, 2.0)
    made.now, made.attempt = made.now + 5000.0, 2
    made.steps(1, 60.0)
    made.steps(6, 2.0)
    assert made.read(tmp_path).step_s == 2.0


def test_a_run_that_has_hardly_begun_shows_only_its_start(made: Records, tmp_path: Path) -> None:
    made.event("ready", imports_s=3.0)
    made.steps(3, 2.0)
    assert made.read(tmp_path) == Pace(1, start_s=3.0)


def test_a_folder_that_does_not_exist_shows_nothing(tmp_path: Path) -> None:
    assert pace.read(tmp_path / "none") == Pace(0)


def test_a_gap_is_compared_with_few_saves(made: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a long run there are too many to compare all gaps with all saves: what is read of a row is counted."""
    for _ in range(100):
        made.steps(20, 1.0)
        made.event("save", seconds=0.5, stall_s=0.1)
    made.read(tmp_path)
    rows, events = records.rows(tmp_path, pace._KEYS), records.events(tmp_path)
    looks = 0

    class Counted(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            nonlocal looks
            looks += key == "time"
            return super().__getitem__(key)

    counted = [Counted(row) for row in rows]
    monkeypatch.setattr(records, "rows", lambda *_: counted)
    monkeypatch.setattr(records, "events", lambda *_: events)
    assert pace.read(tmp_path).save_s == 0.5
    assert looks < 20 * len(counted)
