"""hpcgpt.tracking: what a run of many attempts, rollbacks, kills and outages leaves on the dashboard: each step once.

The shorter cases, one by one, are in test_tracker.py.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.run import run_folder
from hpcgpt.tracking.tracker import NICE
from tests.tracking.attempts import LONG_S, Attempt, fragments, home, server, steps_of, sync, until

pytestmark = pytest.mark.processes
__all__ = ["home", "server"]  # fixtures

OUTAGE_S = 60.0


def roll_back(attempt: Attempt, to: int) -> None:
    """Cut metrics.jsonl off and record it, in the reporter's order."""
    attempt.cut(to)
    run_folder.record(attempt.folder, "rollback", attempt=1, step=to, loss=9.0, spiked_step=to + 1)


def priorities(pid: int) -> dict[str, set[int]]:
    """Return the nice values of all threads of a process and of its descendants, by the name of the process."""
    parents: dict[str, str] = {}
    nice: dict[str, set[int]] = {}
    for path in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(")")[2].split()
            parents[path.parts[2]] = fields[1]
            nice.setdefault(path.parts[2], set()).add(int(fields[16]))
    family = [str(pid)]
    for one in family:
        family += [child for child, parent in parents.items() if parent == one]
    return {f"{one} {Path('/proc', one, 'comm').read_text().strip()}": nice[one] for one in family}


def has_rows(folder: Path) -> bool:
    return bool(steps_of(fragments(folder)))


def test_all_processes_that_send_have_a_low_priority(tmp_path: Path, server: WandbServer) -> None:
    attempt = Attempt(tmp_path)
    attempt.write(range(1, 6))
    assert server.wait(lambda: len(server.steps(attempt.id)) == 5)
    found = priorities(attempt.wait_for_process().pid)
    attempt.tracker.close(0, LONG_S)
    assert set.union(*found.values()) == {NICE}
    assert any("wandb-core" in name for name in found)


@pytest.mark.long
@pytest.mark.alone  # it waits for processes of low priority
@pytest.mark.timeout(900)
def test_five_attempts_three_rollbacks_kills_and_outages_leave_each_step_once(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the run is rewound, in an outage, and when the server has died; it answers the last attempt."""
    monkeypatch.setenv("HPCGPT_TRACKING_INIT_S", "10")
    first = Attempt(tmp_path)
    first.write(range(1, 41))
    assert server.wait(lambda: len(server.steps(first.id)) == 40)
    roll_back(first, 20)
    first.write(range(21, 51))
    assert server.wait(lambda: "RewindRun" in server.requests)
    first.kill()
    second = Attempt(tmp_path, keep=30)
    second.write(range(31, 61))
    assert server.wait(lambda: len(server.steps(second.id)) > 0)
    server.mode = "silent"
    second.write(range(61, 66))
    roll_back(second, 35)
    second.write(range(36, 71))
    time.sleep(OUTAGE_S)
    server.mode = "healthy"
    assert server.wait(lambda: sorted(server.steps(second.id)) == list(range(1, 71)), 240)
    second.kill()
    server.mode = "refusing"
    third = Attempt(tmp_path, keep=70)
    third.write(range(71, 81))
    third.wait_for_process()
    third.tracker.close(75, 4.0)
    server.mode = "failing"
    fourth = Attempt(tmp_path, keep=80)
    fourth.write(range(81, 86))
    assert server.wait(lambda: server.requests[-1:] != [])
    server.mode = "refusing"
    roll_back(fourth, 60)
    fourth.write(range(61, 91))
    fourth.kill()
    server.mode = "healthy"
    last = Attempt(tmp_path, keep=90)
    last.write(range(91, 101))
    last.tracker.close(0, LONG_S)
    assert sorted(server.steps(last.id)) == list(range(1, 101))
    assert list(server.history) == [last.id]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_same_offline_and_a_clean_folder_of_it(tmp_path: Path) -> None:
    """Killed right after each of two rollbacks; `sync --offline` makes one file with the whole run."""
    for keep, back_to, last in ((0, 10, 30), (25, 15, 40), (40, None, 50)):
        attempt = Attempt(tmp_path, "offline", keep=keep)
        attempt.write(range(keep + 1, keep + 21))
        if back_to is not None:
            until(partial(has_rows, attempt.folder))
            roll_back(attempt, back_to)
            attempt.write(range(back_to + 1, last + 1))
            attempt.kill()
        else:
            attempt.tracker.close(0, LONG_S)
    rows = run_folder.read_rows(attempt.folder / "metrics.jsonl")
    parts = fragments(attempt.folder)
    assert sorted(steps_of(parts)) == [row["step"] for row in rows] == list(range(1, 61))
    sync(attempt.folder, "--offline", str(tmp_path / "clean"))
    (whole,) = fragments(tmp_path / "clean")
    assert steps_of([whole]) == list(range(1, 61))
    assert {record["run"]["run_id"] for record in whole if record["type"] == "run"} == {attempt.id}
