"""hpcgpt.status.table: a line for each run, in 80 columns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.run import records
from hpcgpt.run import run_folder as run_folder_module
from hpcgpt.status import run_status, table, why
from hpcgpt.status.figures import columns
from tests.disks import another_user
from tests.disks import shared as shared  # fixture
from tests.status.made_runs import NOW, answering, run_folder, squeue

START = {"attempt": 1, "job": "7_0", "step": 0, "total_steps": 19_073, "world_size": 4, "hosts": ["n1", "n2"]}
SAVED = {"attempt": 1, "status": 75, "reason": "the time limit is near", "step": 3}


def test_a_line_for_each_run_and_below_it_why_jobs_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    going = run_folder(tmp_path, (900, "start", START), steps=120, name="going")
    waits = run_folder(tmp_path, (900, "start", START), (5, "end", SAVED), (4, "requeue", {"job": "7_0"}), steps=3,
                       held=False, name="waits-after-its-time-limit")  # fmt: skip
    new = run_folder(tmp_path, held=False, name="new")
    queue = squeue(f"7|PENDING|{NOW + 7200:.0f}|N/A||Resources")
    queue.load(["7"])
    found = [run_status.brief(folder, NOW, queue) for folder in (going, waits, new)]
    assert table.lines(found, NOW) == [
        "RUN                       STATE         STEP/TOTAL    LOSS  TOK/S   LEFT CHANGED",
        "going                     running        120/19.1k  2.0000      9  5h15m      0s",
        "waits-after-..-time-limit requeued         3/19.1k  2.0000      -      -      0s",
        "new                       new                    0       -      -      -       -",
        "",
        "waits-after-its-time-limit: job 7 (Resources): it is next, as soon as enough",
        "    nodes or GPUs are free; starts 04:46, in 2.0 h",
    ]


def lines_of(count: int, width: int, **fields: Any) -> list[str]:
    base = {"state": "requeued", "step": 123_456_789, "total_steps": 987_654_321, "train/loss": 1234.56789,
            "train/tokens_per_s": 123_456_789.0, "time_left_s": 9e9, "changed_at": 0.0, "job": None}  # fmt: skip
    runs = [{**base, "run": f"/runs/{'a-long-name-' * 5}{number}", **fields} for number in range(count)]
    return table.lines(runs, 1e10, width)


@pytest.mark.parametrize("state", ["running", "requeued", "unreadable", "finished"])
def test_no_line_is_wider_than_the_terminal_and_figures_are_left_out_from_the_right(state: str) -> None:
    for width in (24, 40, 56, 64, 79, 80, 100):
        lines = lines_of(3, width, state=state, reason="no such file")
        assert max(map(len, lines)) <= width
        assert all(state in line for line in lines[1:4])
        head = ["RUN", "STATE", "STEP/TOTAL", "LOSS", "TOK/S", "LEFT", "CHANGED"]
        shown = lines[0].split()
        assert shown == head[: len(shown)]
        assert len(shown) == {24: 2, 40: 3, 56: 5, 64: 6}.get(width, 7)


@pytest.mark.parametrize(
    ("loss", "shown"), [(3.41204, "3.4120"), (1234.56789, "1234.57"), (12_345_678.0, "1.235e7"), (None, "-")]
)
def test_a_loss_keeps_its_size(loss: float | None, shown: str) -> None:
    assert lines_of(1, 80, **{"train/loss": loss})[1].split()[3] == shown


def test_names_of_wide_characters_keep_the_columns_in_line() -> None:
    base = {"state": "new", "step": 1, "total_steps": 9, "train/loss": 1.0, "changed_at": None, "job": None}
    names = ("萧炎", "gpt2", "斗之力" * 20)
    lines = table.lines([{**base, "run": f"/runs/{name}"} for name in names], 1e10)
    assert {columns(line[: line.index("new")]) for line in lines[1:]} == {lines[0].index("STATE")}
    assert max(map(columns, lines)) <= 80


def test_a_wide_terminal_shows_whole_names() -> None:
    assert lines_of(1, 200)[1].startswith("a-long-name-" * 5 + "0 ")
    assert len(lines_of(1, 200)[0]) < 130  # no wider than needed


def test_a_run_that_may_not_be_read_has_a_line_with_the_reason(shared: Path) -> None:
    run_folder_module.prepare(shared / "closed")
    (shared / "closed").chmod(0o700)
    with another_user():
        found = table.brief_or_unreadable(shared / "closed", NOW, answering("unknown"))
    assert found["state"] == "unreadable"
    lines = table.lines([found], NOW)
    assert lines[1].split() == ["closed", "unreadable", "-", "-", "-", "-", "-"]
    assert "Permission denied" in " ".join(lines[3:])


def test_a_run_of_another_user_needs_only_to_be_readable(shared: Path) -> None:
    folder = run_folder(shared, (900, "start", START), steps=120)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with another_user():
        with pytest.raises(PermissionError):
            (folder / "new").touch()
        found = run_status.complete(folder, NOW, answering("there"), with_history=True)
        assert (found["state"], found["step"], found["attempts"]) == ("running", 120, 1)
        assert "running" in table.lines([table.brief_or_unreadable(folder, NOW, answering("there"))], NOW)[1]
        assert "running" in why.as_text(found)


def test_control_characters_in_names_and_reasons_are_escaped(tmp_path: Path) -> None:
    found = [{"run": str(tmp_path / "\x1b[31m"), "state": "unreadable", "reason": "\x1b[2J"}]
    assert "\x1b" not in "".join(table.lines(found, NOW))


def test_the_table_reads_only_the_end_of_a_long_file(tmp_path: Path) -> None:
    """The only evaluation is at the beginning of the file: read as a whole, the run would have a validation loss."""
    folder = run_folder(tmp_path, (900, "start", START), steps=120)
    path = folder / "metrics.jsonl"
    rows = path.read_text()
    first = '{"step": 0, "time": 1.0, "val/loss": 3.0}\n'
    path.write_text(first + rows)
    assert run_status.brief(folder, NOW)["val/loss"] == 3.0
    path.write_text(first + "x" * records.TAIL_BYTES + "\n" + rows)
    found = run_status.brief(folder, NOW)
    assert (found["step"], found["val/loss"]) == (120, None)
    assert run_status.complete(folder, NOW)["goodput"]["productive_s"] == 120.0
