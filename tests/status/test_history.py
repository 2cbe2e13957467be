"""hpcgpt.status.history and hpcgpt.status.why: a line for each attempt, with what the requeue policy decided."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.status import run_status, why
from tests.status.made_runs import NOW, answering, run_folder

START = {"attempt": 1, "job": "7_0", "step": 0, "total_steps": 900, "world_size": 4, "hosts": ["n1", "n1", "n2"]}
KILLED = "crash 1 since the last new checkpoint: rank 3 on n2: Killed"
CRASH = {"job": "7_1", "status": 137, "reason": KILLED, "rank": 3, "host": "n2", "excluded": ["n2"]}
NEAR = "the time limit is near"


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def lines(tmp_path: Path, *events: tuple[float, str, dict[str, Any]]) -> list[str]:
    folder = run_folder(tmp_path, *events, held=False)
    return why.lines(run_status.complete(folder, NOW, answering("unknown"), with_history=True))


def test_a_line_for_each_attempt(tmp_path: Path) -> None:
    assert lines(
        tmp_path,
        (9000, "job", {"job": "7_0", "started_at": NOW - 9000, "hosts": ["n1", "n2"]}),
        (8990, "start", START),
        (4000, "save", {"attempt": 1, "step": 120}),
        (3999, "end", {"attempt": 1, "status": 75, "step": 120, "reason": NEAR}),
        (3998, "requeue", {"job": "7_0", "reason": f"saved at step 120: {NEAR}"}),
        (3000, "start", START | {"attempt": 2, "job": "7_1", "step": 120}),
        (2900, "save", {"attempt": 2, "step": 150}),
        (2800, "crash", CRASH),
        (2799, "requeue", {"job": "7_1", "reason": CRASH["reason"]}),
        (2000, "start", START | {"attempt": 3, "job": "7_2", "step": 150, "lost_steps": 20, "hosts": ["n1", "n3"]}),
        (1000, "job", {"job": "7_3"}),
        (990, "start", START | {"attempt": 4, "job": "7_3", "step": 150, "lost_steps": 5, "hosts": ["n10", "n3"]}),
        (500, "end", {"attempt": 4, "status": 0, "step": 900, "reason": "finished"}),
        (499, "no_requeue", {"job": "7_3", "reason": "training is finished"}),
    ) == [
        "#1 01-01 00:16  job 7_0  1h23m  n[1-2]  +120  to 120  saved at step 120: the time limit is near -> requeued",
        "#2 01-01 01:56  job 7_1  3m20s  n[1-2]   +30  to 150  crash 1 since the last new checkpoint: rank 3 on n2: "
        "Killed, 20 steps lost -> requeued, without n2",
        "#3 01-01 02:13  job 7_2     0s  n[1,3]    +0  to 150  nothing reported: killed, or its node failed, 5 steps "
        "lost -> requeued by Slurm itself",
        "#4 01-01 02:30  job 7_3  8m10s  n10,n3  +750  to 900  finished",
    ]


def test_a_start_that_never_trained_and_a_policy_that_gave_up(tmp_path: Path) -> None:
    loop = "crash loop: 3 crashes without a new checkpoint, the last one: rank 0 is missing"
    assert lines(
        tmp_path,
        (100, "job", {"job": "7_1", "started_at": NOW - 101, "hosts": ["n1", "n3"]}),
        (80, "crash", {"job": "7_1", "status": 2, "reason": loop, "rank": None, "host": None}),
        (79, "give_up", {"job": "7_1", "reason": loop}),
    ) == [f"- 01-01 02:44  job 7_1  21s  n[1,3]  +0    {loop} -> given up"]


def test_the_next_job_where_requeueing_is_forbidden(tmp_path: Path) -> None:
    found = lines(
        tmp_path,
        (300, "start", START),
        (2, "end", {"attempt": 1, "status": 75, "step": 3, "reason": NEAR}),
        (1, "chain", {"job": "7_0", "next_job": "8", "reason": f"saved at step 3: {NEAR}"}),
    )
    assert found[0].endswith(f"saved at step 3: {NEAR} -> queued as job 8")


def test_the_newest_attempt_may_be_running(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (300, "start", START), steps=9)
    found = why.as_text(run_status.complete(folder, NOW, None, with_history=True))
    assert found.splitlines()[0] == f"{folder}: running"
    assert found.endswith("+9  to 9  running")


def test_a_run_without_an_attempt(tmp_path: Path) -> None:
    assert lines(tmp_path) == ["no attempt yet"]


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([], ""),
        (["n1"], "n1"),
        (["n1", "n2", "n3", "n7"], "n[1-3,7]"),
        (["n08", "n09", "n10"], "n[08-10]"),
        (["n9", "n10"], "n9,n10"),
        (["gpu-a-1", "login", "gpu-a-2", "b3", "login"], "login,gpu-a-[1-2],b3"),
    ],
)
def test_hosts_are_written_as_slurm_writes_them(hosts: list[str], text: str) -> None:
    assert why.compressed(hosts) == text
