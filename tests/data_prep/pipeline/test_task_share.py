"""data_prep.pipeline.task_share: a share is made by one living process; the dead ones are watched all at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.pipeline import task_share
from data_prep.pipeline.task_share import TaskShare
from hpcgpt.errors import UserError
from hpcgpt.storage import lease


class Clock:
    """Stands in for the module time: sleeping takes no time, and is added up."""

    def __init__(self) -> None:
        self.slept_s = 0.0

    def sleep(self, duration_s: float) -> None:
        self.slept_s += duration_s

    def monotonic(self) -> float:
        return self.slept_s

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(lease, "time", made)
    return made


def held_elsewhere(out: Path, share: TaskShare) -> Path:
    """Write a lease that was not released, of a process on another host; return its heartbeat's file."""
    folder = out / "prep" / "shares" / f"{share.task:04d}_of_{share.tasks:04d}" / "generations"
    folder.mkdir(parents=True)
    (folder / "000001.json").write_text(json.dumps({"host": "node07", "pid": 4711, "attempt": ""}))
    return folder / "000001.alive"


def test_overlapping_shares_of_a_killed_array_are_watched_in_the_same_ten_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in range(20):
        held_elsewhere(tmp_path, TaskShare(task, 20))
    with task_share.acquire(tmp_path, TaskShare(0, 1)):
        pass
    assert clock.slept_s == lease.WATCH_S
    assert "pid 4711) has not released its lease, like 19 others: watching" in capsys.readouterr().out


def test_one_that_is_alive_is_reported_with_what_can_be_done(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats = [held_elsewhere(tmp_path, TaskShare(task, 3)) for task in range(3)]

    def sleep(duration_s: float) -> None:
        clock.slept_s += duration_s
        beats[2].write_text(f"{clock.slept_s}")

    monkeypatch.setattr(clock, "sleep", sleep)
    expected = r"made already, in other shares: .*0002_of_0003 is in use by .*node07, .*: wait until it has finished"
    with pytest.raises(UserError, match=expected) as refused, task_share.acquire(tmp_path, TaskShare(0, 1)):
        pass
    assert "--run.name" not in str(refused.value)
