"""hpcgpt.run.condensed: few rows from which attempts and goodput are the same as from all."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.run import attempts, condensed, goodput

Record = dict[str, Any]


def made_run(folder: Path, seed: int, steps: int = 600) -> None:
    """Write a run with attempts that save, evaluate, roll back, crash, and repeat steps, with clocks that jitter."""
    generator = random.Random(seed)
    events: list[Record] = []
    rows: dict[int, Record] = {}
    now, saved, step, attempt = 1000.0, 0, 0, 0
    while step < steps:
        attempt += 1
        job, step = f"7_{attempt - 1}", saved
        events.append({"time": now, "event": "job", "job": job, "queued_at": now - 5, "started_at": now})
        now += 3
        began_at, now = now, now + 4
        events.append({"time": now, "event": "start", "attempt": attempt, "job": job, "step": step,
                       "began_at": began_at, "lost_steps": 0, "hosts": ["n1"], "world_size": 1})  # fmt: skip
        rows = {number: row for number, row in rows.items() if number <= step}
        if generator.random() < 0.7:
            now += 2
            events.append({"time": now, "event": "ready", "attempt": attempt, "warm_up_s": 1.0, "load_s": 0.5})
        for _ in range(generator.randrange(20, 200)):
            step += 1
            took = generator.uniform(0.5, 1.0)
            now += took + generator.choice([0.0, 0.0, 0.02, 1.5])
            rows[step] = {
                "step": step,
                "time": now,
                "attempt": attempt,
                "train/step_s": took + generator.choice([0, 0.03]),
            }
            if step % 25 == 0:
                rows[step]["val/elapsed_s"] = 3.0
                now += 3.0
            if step % 40 == 0:
                events.append({"time": now + 0.1, "event": "save", "attempt": attempt, "step": step, "stall_s": 0.7})
                now, saved = now + 0.8, step
            if generator.random() < 0.01 and step > saved:
                events.append({"time": now + 1, "event": "rollback", "attempt": attempt, "step": saved,
                               "since": rows[saved]["time"] if saved in rows else began_at, "spiked_step": step,
                               "lost_steps": step - saved})  # fmt: skip
                now, step = now + 1, saved
                rows = {number: row for number, row in rows.items() if number <= step}
            if step >= steps:
                break
        if generator.random() < 0.5:
            status = 0 if step >= steps else 75
            saved = step
            events.append({"time": now, "event": "save", "attempt": attempt, "step": step, "stall_s": 0.2})
            events.append({"time": now + 0.5, "event": "end", "attempt": attempt, "status": status, "step": step})
        now += generator.uniform(1, 30)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


@pytest.mark.parametrize("seed", range(12))
def test_goodput_and_attempts_are_those_of_all_rows(tmp_path: Path, seed: int) -> None:
    made_run(tmp_path, seed)
    events, rows = attempts.read(tmp_path, attempts.TIMING)
    few = condensed.timing(tmp_path, events)
    assert len(few) < len(rows) / 3
    for now in (None, rows[-1]["time"] + 7.0):
        expected, found = goodput.measure(events, rows, now), goodput.measure(events, few, now)
        # A wait for a save takes time that is unclaimed, other or lost, near it: that is in other places here.
        unclaimed = {"other_s", "lost_s", "save_stall_s"}
        for name, seconds in expected.as_dict().items():
            assert found.as_dict()[name] == pytest.approx(seconds, abs=0.1 if name in unclaimed else 1e-6), name
        assert found.other_s + found.lost_s + found.save_stall_s == pytest.approx(
            expected.other_s + expected.lost_s + expected.save_stall_s, abs=1e-6
        )
        for one, other in zip(attempts.attempts(events, rows, now), attempts.attempts(events, few, now), strict=True):
            assert (one.number, one.from_step, one.to_step, one.lost_steps) == (
                other.number, other.from_step, other.to_step, other.lost_steps
            )  # fmt: skip
            assert (one.began_at, one.ended_at, one.first_step_at) == (
                other.began_at, other.ended_at, other.first_step_at
            )  # fmt: skip


def test_a_long_attempt_without_saves_is_few_rows(tmp_path: Path) -> None:
    rows = [{"step": n, "time": 10.0 + n, "attempt": 1, "train/step_s": 0.75} for n in range(1, 5001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = condensed.timing(tmp_path, [])
    assert [row["step"] for row in few] == [1, 5000]
    assert few[1]["train/step_s"] == pytest.approx(4999 * 0.75)
