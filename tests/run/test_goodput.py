"""hpcgpt.run.goodput: all time of a run is divided into kinds, whatever is missing from its files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.run import attempts, goodput
from hpcgpt.run.goodput import Goodput

JOB = {"job": "7_0"}


def write(folder: Path, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> Path:
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return folder


def event(at: float, name: str, **fields: Any) -> dict[str, Any]:
    return {"time": at, "event": name, **fields}


def row(step: int, at: float, attempt: int, step_s: float = 1.0, **more: float) -> dict[str, Any]:
    """The row of a step that ended `at`."""
    return {"step": step, "time": at, "attempt": attempt, "train/step_s": step_s, **more}


def seconds(found: Goodput) -> dict[str, float]:
    """Return the times that are not zero, without the suffix of the unit."""
    return {name.removesuffix("_s"): round(value, 6) for name, value in found.seconds.items() if round(value, 6)}


def measured(folder: Path, now: float | None = None) -> Goodput:
    return goodput.measure(*attempts.read(folder), now)


# --- a complete run --------------------------------------------------------------------------------


def test_a_chain_of_two_jobs_with_a_crash_is_accounted_for_to_the_second(tmp_path: Path) -> None:
    """Queued at 100, killed at 148 with a checkpoint of step 4; the second job evaluates, and finishes."""
    folder = write(
        tmp_path,
        [
            event(111, "job", job="7_0", queued_at=100, started_at=110, hosts=["n1"]),
            event(118, "start", attempt=1, job="7_0", step=0, total_steps=6, began_at=112, lost_steps=0, lost_s=0),
            # 2 s of imports, 1 s until the ranks met, 4 s of warm-up, 1 s of loading
            event(120, "ready", attempt=1, step=0, imports_s=2, meet_s=1, warm_up_s=4, load_s=1),
            event(132, "save", attempt=1, step=4, seconds=4.0, stall_s=0.5),
            event(148, "crash", job="7_0", status=137, reason="crash 1", rank=3, host="n2"),
            event(149, "requeue", job="7_0", reason="crash 1"),
            event(156, "job", job="7_1", queued_at=150, started_at=155, hosts=["n1"]),
            event(159, "start", attempt=2, job="7_1", step=4, total_steps=6, began_at=157, lost_steps=9, lost_s=9),
            event(160, "ready", attempt=2, step=4, imports_s=1, meet_s=0.5, warm_up_s=1, load_s=0.5),
            event(169, "save", attempt=2, step=6, seconds=1.0, stall_s=0.5),  # at its commit
            event(170, "save_stall", attempt=2, step=6, stall_s=1.5),  # at its end
            event(171, "end", attempt=2, status=0, reason="finished", step=6),
        ],
        [
            *(row(n, 120 + 2 * n, 1, step_s=2) for n in range(1, 5)),
            row(5, 162, 2, step_s=2),
            row(6, 164, 2, step_s=2, **{"val/loss": 1, "val/elapsed_s": 3}),
        ],
    )
    found = measured(folder)
    assert seconds(found) == {
        "productive": 12,  # six steps
        "evaluation": 3,
        "lost": 19.5,  # from the end of step 4 at 128 to the crash at 148, without the stall
        "save_stall": 2.5,
        "restart": (120 - 110 - 4) + (160 - 155 - 1),
        "compile": 5,
        "queue": 10 + (155 - 148),
        "other": 171 - 167 - 2,
    }
    assert found.total_s == pytest.approx(71)
    assert found.goodput == pytest.approx(12 / 71)
    assert (found.lost_steps, found.attempts) == (9, 2)


def test_the_table_names_each_kind_and_its_share(tmp_path: Path) -> None:
    write(
        tmp_path,
        [event(0, "start", attempt=1, step=0), event(8, "end", attempt=1, status=0, step=2, reason="finished")],
        [row(1, 2, 1, 2), row(2, 4, 1, 2)],
    )
    lines = goodput.table(tmp_path).splitlines()
    assert lines[0] == "goodput 50.0% over 1 attempt"
    assert len({len(line) for line in lines[1:-1]}) == 1, "not aligned"
    assert [line.split()[-4:] for line in lines[1:3]] == [
        ["productive", "4.0", "s", "50.0%"],
        ["evaluation", "0.0", "s", "0.0%"],
    ]
    assert lines[-1].split() == ["total", "8.0", "s"]
    assert set(goodput.SHOWN) == set(measured(tmp_path).seconds)


# --- how attempts end ------------------------------------------------------------------------------

END = event(20, "end", attempt=1, status=75, step=4, reason="told to terminate")
FOUR = [row(n, 10 + n, 1) for n in range(1, 5)]


@pytest.mark.parametrize(
    ("name", "events", "metrics", "now", "expected", "lost_steps"),
    [
        ("nothing", [], [], None, {}, 0),
        ("a job without ranks so far", [event(9, "job", queued_at=1, started_at=8, **JOB)], [], None,
         {"queue": 7, "restart": 1}, 0),
        ("a job whose ranks never began",
         [event(9, "job", queued_at=1, started_at=8, **JOB), event(20, "crash", **JOB)], [], None,
         {"queue": 7, "restart": 12}, 0),
        ("the user stopped it for a while: idle; the wait for Slurm: queue",
         [event(10, "start", attempt=1, step=0, **JOB), END | {"job": "7_0"},
          event(1009, "job", job="8_0", queued_at=1000, started_at=1008),
          event(1012, "start", attempt=2, step=4, job="8_0"),
          event(1014, "end", attempt=2, status=0, step=5, reason="finished")], [*FOUR, row(5, 1013, 2)], None,
         {"productive": 5, "other": 7, "idle": 980, "queue": 8, "restart": 4}, 0),
        ("requeued, and queued since",
         [event(9, "job", queued_at=1, started_at=8, **JOB), event(10, "start", attempt=1, step=0, **JOB), END,
          event(21, "requeue", **JOB), event(99, "job", job="7_1", queued_at=50, started_at=98)], FOUR, None,
         {"productive": 4, "other": 6, "queue": 7 + 78, "restart": 3}, 0),
        ("chained, and queued since",
         [event(10, "start", attempt=1, step=0, **JOB), END, event(21, "chain", next_job="8", **JOB),
          event(99, "job", job="8_0", started_at=98)], FOUR, None,
         {"productive": 4, "other": 6, "queue": 78, "restart": 1}, 0),
        ("just started", [event(10, "start", attempt=1, step=0, began_at=5)], [], 30, {"restart": 5, "other": 20}, 0),
        ("running", [event(10, "start", attempt=1, step=0)], FOUR, 20, {"productive": 4, "other": 6}, 0),
        ("saved and left", [event(10, "start", attempt=1, step=0), END], FOUR, None, {"productive": 4, "other": 6}, 0),
        ("died, without a next attempt",
         [event(10, "start", attempt=1, step=0), event(12.5, "save", attempt=1, step=2, stall_s=0),
          event(20, "crash", **JOB)], FOUR, None, {"productive": 2, "lost": 2, "idle": 6}, 2),
        ("the same in a Slurm job: the time of its end is known",
         [event(10, "start", attempt=1, step=0, **JOB), event(12.5, "save", attempt=1, step=2, stall_s=0),
          event(20, "crash", **JOB)], FOUR, None, {"productive": 2, "lost": 8}, 2),
        ("SIGKILL and a second attempt, without Slurm",
         [event(10, "start", attempt=1, step=0), event(20, "start", attempt=2, step=4, lost_steps=3, lost_s=2.5),
          event(22, "end", attempt=2, status=0, step=5, reason="finished")],
         [*FOUR, row(5, 21, 2)], None, {"productive": 5, "lost": 2.5, "idle": 3.5, "other": 1}, 3),
        ("a run of a version that did not record lost steps",
         [event(10, "start", attempt=1, step=0), event(14, "save", attempt=1, step=4, seconds=0.5),
          event(20, "start", attempt=2, step=4), event(22, "end", attempt=2, status=0, step=5, reason="finished")],
         [*FOUR, row(5, 21, 2)], None, {"productive": 5, "idle": 6, "other": 1}, 0),
        ("everything lost: no checkpoint yet",
         [event(10, "start", attempt=1, step=0), event(15, "hang", attempt=1, step=3),
          event(20, "start", attempt=2, step=0, lost_steps=4, lost_s=4)], [row(1, 21, 2)], 22,
         {"productive": 1, "lost": 5, "idle": 5, "other": 1}, 4),
        ("the last checkpoint could not be written",
         [event(10, "start", attempt=1, step=0), event(13, "save", attempt=1, step=2, stall_s=0),
          event(15, "save_failed", attempt=1, step=4, stall_s=0.5),
          event(16, "end", attempt=1, status=1, step=4, reason="disk full")], FOUR, None,
         {"productive": 2, "lost": 3.5, "save_stall": 0.5}, 2),
        ("a checkpoint was damaged: what an attempt had saved is lost",
         [event(10, "start", attempt=1, step=0), END, event(20, "start", attempt=2, step=2, lost_steps=2, lost_s=2)],
         [FOUR[0], FOUR[1], row(3, 21, 2)], 21, {"productive": 3, "lost": 8}, 2),
        ("a superseded attempt that continues after the next one began",
         [event(10, "start", attempt=1, step=0), event(14, "start", attempt=2, step=2, lost_steps=0, lost_s=0),
          event(15, "save", attempt=1, step=4, seconds=1, stall_s=1),
          event(16, "end", attempt=2, status=0, step=3, reason="finished")],
         [row(1, 11, 1), row(2, 12, 1), row(3, 15, 2)], None, {"productive": 3, "lost": 2, "other": 1}, 2),
        ("a superseded attempt that records an event after the end of the next one",
         [event(10, "start", attempt=1, step=0), event(14, "start", attempt=2, step=2),
          event(16, "end", attempt=2, status=0, step=3, reason="finished"), event(25, "hang", attempt=1)],
         [row(1, 11, 1), row(2, 12, 1), row(3, 15, 2)], None, {"productive": 3, "lost": 2, "other": 1, "idle": 9}, 0),
        ("a superseded attempt that records its end after that of the next one",
         [event(10, "start", attempt=1, step=0), event(14, "start", attempt=2, step=2),
          event(16, "end", attempt=2, status=0, step=3, reason="finished"), END | {"time": 25}],
         [row(1, 11, 1), row(2, 12, 1), row(3, 15, 2)], None, {"productive": 3, "lost": 2, "other": 1, "idle": 9}, 2),
        ("two attempts of one job, as torchrun makes them: the crash is that of the second",
         [event(10, "start", attempt=1, step=0, **JOB), event(20, "start", attempt=2, step=4, **JOB),
          event(26, "crash", **JOB)], FOUR, None, {"productive": 4, "lost": 6, "queue": 6}, 0),
        ("stopped within an evaluation, which the next attempt repeats",
         [event(10, "start", attempt=1, step=0), event(12, "end", attempt=1, status=75, step=1, reason="interrupted"),
          event(20, "start", attempt=2, step=1), event(26, "end", attempt=2, status=0, step=1, reason="finished")],
         [row(1, 11, 1, **{"val/elapsed_s": 4})], None, {"productive": 1, "evaluation": 4, "idle": 8, "other": 3}, 0),
        ("a stall that is spread over the steps after the one that is saved",
         [event(10, "start", attempt=1, step=0), event(19, "save", attempt=1, step=1, seconds=9, stall_s=1.5), END],
         [row(n, 10 + 2 * n, 1) for n in range(1, 5)], None,
         {"productive": 4, "save_stall": 1.5, "restart": 1, "other": 3.5}, 0),
        ("a stall longer than the time left",
         [event(10, "start", attempt=1, step=0), event(15, "save", attempt=1, step=4, stall_s=100), END], FOUR, None,
         {"productive": 4, "save_stall": 6}, 0),
        ("a start event lost to a full disk", [END], FOUR, None, {"productive": 4, "other": 6}, 0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_time_is_divided_into_kinds(
    tmp_path: Path,
    name: str,  # noqa: ARG001 (the id)
    events: list[dict[str, Any]],
    metrics: list[dict[str, Any]],
    now: float | None,
    expected: dict[str, float],
    lost_steps: int,
) -> None:
    found = measured(write(tmp_path, events, metrics), now)
    assert seconds(found) == expected
    assert found.lost_steps == lost_steps


def test_goodput_is_a_fraction_of_the_time_in_which_the_run_was_not_idle(tmp_path: Path) -> None:
    """A month's break does not count as queue time."""
    month_s = 30 * 86400
    write(tmp_path, [event(10, "start", attempt=1, step=0), END, event(month_s, "start", attempt=2, step=4),
                     event(month_s + 4, "end", attempt=2, status=0, step=8, reason="finished")],
          [*FOUR, *(row(n, month_s + n - 4, 2) for n in range(5, 9))])  # fmt: skip
    found = measured(tmp_path)
    assert found.goodput == pytest.approx(8 / 14)
    assert found.idle_s == pytest.approx(month_s - 20)
    assert found.queue_s == 0
    assert Goodput.from_dict(found.as_dict()) == found
    old = {key: value for key, value in found.as_dict().items() if key != "idle_s"}
    assert Goodput.from_dict(old).goodput == pytest.approx(8 / 14), "figures of a version without idle time"
    assert "goodput 57.1%: other 42.9%; idle for 2,591,980 s besides" in found.line()


def test_a_starting_job_does_not_extend_the_attempt_before_it(tmp_path: Path) -> None:
    """Its start-up counts as restart, and the attempt that crashed before it ended at the crash."""
    folder = write(tmp_path, [event(10, "start", attempt=1, step=0, **JOB), event(20, "crash", **JOB),
                              event(31, "job", job="7_1", queued_at=20, started_at=30)], [])  # fmt: skip
    found = goodput.measure(*attempts.read(folder), 50, stepping=False)
    assert seconds(found) == {"lost": 10, "queue": 10, "restart": 20}


def test_torn_lines_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, [event(10, "start", attempt=1, step=0), END], FOUR)
    for name in ("events.jsonl", "metrics.jsonl"):
        first, _, rest = (tmp_path / name).read_text().partition("\n")
        (tmp_path / name).write_text(f'{first}\n{{"step": 9, "ti\n[]\n{{}}\n{rest}{{"torn": ')
    assert seconds(measured(tmp_path)) == {"productive": 4, "other": 6}


@pytest.mark.parametrize("seeds", [range(first, first + 20) for first in range(0, 200, 20)])
def test_the_kinds_add_up_to_the_total_whatever_the_files_contain(tmp_path: Path, seeds: range) -> None:
    for seed in seeds:
        assert_kinds_add_up(tmp_path, seed)


def assert_kinds_add_up(folder: Path, seed: int) -> None:
    """With events and rows at random moments, in any order, with attempts that overlap and clocks that jump."""
    draw = random.Random(seed)
    names = ["job", "start", "ready", "save", "save_stall", "save_failed", "stop", "hang", "end", "crash", "requeue"]
    numbers = ["queued_at", "started_at", "began_at", "seconds", "stall_s", "warm_up_s", "load_s", "lost_s"]
    events = []
    for _ in range(draw.randrange(30)):
        fields: dict[str, Any] = {key: draw.uniform(0, 1000) for key in numbers if draw.random() < 0.5}
        fields |= {"attempt": draw.randrange(1, 5)} if draw.random() < 0.9 else {}
        fields |= {"step": draw.randrange(50), "status": draw.choice([0, 1, 75]), "job": f"7_{draw.randrange(3)}"}
        fields |= {"lost_steps": draw.randrange(9)} if draw.random() < 0.5 else {}
        events.append(event(draw.uniform(0, 1000), draw.choice(names), **fields))
    metrics = [row(n, draw.uniform(0, 1000), draw.randrange(1, 6), draw.uniform(0, 30), **{"val/elapsed_s": 5.0})
               for n in range(draw.randrange(40))]  # fmt: skip
    now = draw.choice([None, 1000.0])
    found = measured(write(folder, events, metrics), now)
    moments = [at for e in events for at in (e["time"], e.get("began_at", e["time"]), e.get("queued_at", e["time"]))]
    moments += [at for r in metrics for at in (r["time"], r["time"] - r["train/step_s"])]
    moments += [now] if now else []
    # An attempt that died may have lived beyond the last line.
    moments += [attempt.ended_at for attempt in attempts.attempts(*attempts.read(folder), now)]
    assert found.total_s == pytest.approx(max(moments, default=0.0) - min(moments, default=0.0), abs=1e-6)
    assert all(value >= 0 for value in found.seconds.values())
    stood_still = sum(e.get("stall_s", e.get("seconds", 0))
                      for e in events if e["event"] in ("save", "save_stall", "save_failed"))  # fmt: skip
    assert found.save_stall_s <= stood_still + 1e-6
