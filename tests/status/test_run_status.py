"""hpcgpt.status.run_status and hpcgpt.status.run_state: the state of a run, from its folder and Slurm's answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.checkpoint import layout
from hpcgpt.run import attempts
from hpcgpt.run import run_folder as run_folder_module
from hpcgpt.slurm.queue import Presence
from hpcgpt.status import as_text, run_status, why
from hpcgpt.status.run_state import NOTHING_REPORTED
from tests.programs import ROOT, Running, clean_env, command
from tests.status.made_runs import NOW, answering, run_folder, squeue
from tests.tiny_run import rows


def status(folder: Path, now: float, with_history: bool = False, presence: Presence = "unknown") -> dict[str, Any]:
    return run_status.complete(folder, now, answering(presence), with_history)


def _as_text(found: dict[str, Any]) -> str:
    return as_text.as_text(found, NOW)


@pytest.mark.processes
def test_a_finished_run_is_shown_as_text_and_in_json(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny)).returncode == 0
    folder = tmp_path / "runs" / "tiny"
    done = command("hpcgpt.status", str(folder))
    assert done.returncode == 0
    assert f"{folder}: finished\n  step 12 of 12" in done.stdout
    assert "\n  goodput " in done.stdout
    found = json.loads(command("hpcgpt.status", "--json", str(folder)).stdout)
    last = rows(folder / "metrics.jsonl")[-1]
    assert (found["state"], found["step"], found["checkpoint_step"], found["attempts"]) == ("finished", 12, 12, 1)
    assert found["val/bits_per_byte"] == last["val/bits_per_byte"]
    assert found["time_left_s"] == 0
    # All time of a real run is accounted for.
    spent = found["goodput"]
    assert spent["productive_s"] == pytest.approx(
        sum(r["train/step_s"] for r in rows(folder / "metrics.jsonl")), rel=0.1
    )
    assert spent["goodput"] == pytest.approx(spent["productive_s"] / spent["total_s"])
    assert spent["lost_steps"] == spent["lost_s"] == 0


@pytest.mark.processes
def test_a_run_that_was_asked_to_stop_is_saved_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    """The end of the job is near from the start: one step, then it stops."""
    assert command("hpcgpt.train", str(tiny), env={"SLURM_JOB_END_TIME": "1"}).returncode == 75
    found = json.loads(command("hpcgpt.status", "--json", str(tmp_path / "runs" / "tiny")).stdout)
    assert (found["state"], found["step"], found["total_steps"]) == ("saved", 1, 12)
    assert "time limit" in found["reason"]


@pytest.mark.processes
def test_a_folder_without_a_run_is_a_user_error(tmp_path: Path) -> None:
    done = command("hpcgpt.status", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no run in {tmp_path}")


# --- a real run: started, killed, finished ---------------------------------------------------------


@pytest.mark.processes
def test_a_run_is_running_then_stale_then_failed_by_a_kill_then_finished(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    with Running("hpcgpt.train", str(tiny), "--train.steps", "3000") as process:
        deadline = time.monotonic() + 60
        while len(run_folder_module.read_rows(folder / "metrics.jsonl")) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)  # so that it stays at one step while it is read
        alive = status(folder, time.time())
        later = status(folder, time.time() + 1000)
    killed = status(folder, time.time() + 1000)
    assert (alive["state"], alive["reason"]) == ("running", "")
    assert (killed["state"], killed["reason"]) == ("failed", NOTHING_REPORTED)
    assert later["state"] == "stale"
    text = _as_text(later)
    assert "nothing written for 16" in text
    assert "its process or its node is gone; see `squeue --me`" in text
    # 1000 s of silence are not training time, and a run that has ended does not get older.
    assert later["goodput"]["total_s"] - alive["goodput"]["total_s"] == pytest.approx(1000, abs=5)
    assert later["goodput"]["productive_s"] == pytest.approx(alive["goodput"]["productive_s"])
    assert killed["goodput"]["total_s"] < 500
    assert killed["goodput"]["lost_steps"] == killed["step"] - killed["checkpoint_step"]

    # The event of a checkpoint that was committed right before the kill may be missing.
    newest = layout.step_of(layout.found(folder / "checkpoints")[0])
    assert newest >= killed["checkpoint_step"]
    last = str(newest + 2)
    assert command("hpcgpt.train", str(tiny), "--train.steps", last).returncode == 0
    done = command("hpcgpt.status", "--history", str(folder))
    assert done.returncode == 0
    first, second = status(folder, time.time(), with_history=True)["history"]
    assert (first["reason"], second["reason"]) == (NOTHING_REPORTED, "finished")
    assert second["from_step"] == newest
    assert second["to_step"] == int(last)
    for line in (f"ended: {NOTHING_REPORTED}", "ended: finished", "goodput ", "lost after the last checkpoint"):
        assert line in done.stdout


# --- states that do not occur without Slurm ---------------------------------------------------------

JOB = {"job": "7_0", "queued_at": NOW - 400, "started_at": NOW - 300, "hosts": ["n1", "n2"]}
START = {"attempt": 1, "job": "7_0", "step": 0, "total_steps": 9, "world_size": 4, "hosts": ["n1", "n1", "n2", "n2"]}
SAVED = {"attempt": 1, "status": 75, "reason": "told to terminate", "step": 3}
CRASH = {"job": "7_0", "status": 137, "reason": "crash 1: rank 3 was killed", "rank": 3, "host": "n2",
         "excluded": ["n2"]}  # fmt: skip


@pytest.mark.parametrize(
    ("events", "steps", "held", "expected", "reason"),
    [
        ([], 0, False, "new", ""),
        ([(300, "job", JOB)], 0, False, "starting", ""),
        ([(700, "job", JOB)], 0, False, "stale", ""),
        ([(300, "job", JOB), (200, "start", START)], 0, True, "running", ""),
        ([(900, "job", JOB), (800, "start", START)], 0, True, "stale", ""),
        ([(900, "start", START)], 3, True, "running", ""),
        ([(900, "start", START)], 3, False, "failed", NOTHING_REPORTED),
        ([(9, "start", START), (1, "end", SAVED)], 3, False, "saved", "told to terminate"),
        ([(9, "start", START), (2, "end", SAVED), (1, "requeue", {"job": "7_0"})], 3, False, "requeued",
         "told to terminate"),
        ([(9, "start", START), (2, "crash", CRASH)], 3, True, "failed", CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "requeue", {"job": "7_0"})], 3, True, "requeued",
         CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "chain", {"job": "7_0", "next_job": "8"})], 3, True, "requeued",
         CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "job", JOB | {"job": "7_1"})], 3, True, "starting", ""),
        ([(9, "start", START), (1, "end", SAVED | {"status": 0, "reason": "finished"})], 3, False, "finished",
         "finished"),
        ([(9, "start", START), (1, "end", SAVED | {"status": 1, "reason": "no room"})], 3, False, "failed", "no room"),
    ],
)  # fmt: skip
def test_the_state_follows_from_the_newest_event(
    tmp_path: Path, events: list[Any], steps: int, held: bool, expected: str, reason: str
) -> None:
    found = status(run_folder(tmp_path, *events, steps=steps, held=held), NOW)
    assert (found["state"], found["reason"]) == (expected, reason)
    # A reason that only repeats the state is not shown.
    shown = expected if reason in ("", expected) else f"{expected} ({reason})"
    assert _as_text(found).splitlines()[0] == f"{tmp_path}/run: {shown}"


def test_imported_weights_stand_at_step_0_and_a_run_of_its_own_trains_on(tmp_path: Path) -> None:
    folder = tmp_path / "qwen 3"
    run_folder_module.prepare(folder)
    assert status(folder, NOW)["state"] == "new"
    (folder / "imported.json").write_text("{}")
    for found in (status(folder, NOW), status(run_folder(tmp_path, (9, "job", JOB), name="qwen 3"), NOW)):
        assert (found["state"], found["step"], found["checkpoint_step"]) == ("imported", 0, 0)
        assert f"what to do: hpcgpt train '{folder}/config.toml' --data.dir SHARDS\n" in _as_text(found)
        assert "newest checkpoint: step 0" in _as_text(found)


FINISHED = SAVED | {"status": 0, "reason": "finished"}
SECOND = JOB | {"job": "9_0"}
GONE = "job 9 was cancelled, or ended, before training began"
STAYS_STOPPED = "a STOP file keeps it stopped"


@pytest.mark.parametrize(
    ("events", "steps", "held", "presence", "stop", "expected", "reason"),
    [
        # Cancelled while it started, as Slurm shows.
        ([(30, "job", SECOND)], 0, False, "gone", False, "stopped", GONE),
        ([(900, "job", SECOND)], 0, False, "gone", False, "stopped", GONE),
        ([(900, "job", SECOND)], 0, False, "there", False, "stale", ""),
        ([(30, "job", SECOND)], 0, False, "pending", False, "requeued", ""),
        ([(30, "job", SECOND), (20, "no_requeue", {"job": "9_0", "reason": "the job was cancelled"})], 0, False,
         "unknown", False, "stopped", "the job was cancelled"),
        # A second job that was refused changes neither a finished run nor a running one.
        ([(950, "start", START), (940, "end", FINISHED), (900, "job", SECOND)], 3, False, "unknown", False, "finished",
         "finished"),
        ([(950, "start", START), (940, "end", FINISHED), (30, "job", SECOND)], 3, False, "gone", False, "finished",
         "finished"),
        ([(950, "start", START), (940, "end", FINISHED), (30, "job", SECOND),
          (20, "no_requeue", {"job": "9_0", "reason": "a person has to act"})], 3, False, "unknown", False, "finished",
         "finished"),
        ([(950, "start", START), (30, "job", SECOND)], 3, True, "unknown", False, "running", ""),
        ([(950, "start", START), (30, "job", SECOND), (20, "crash", CRASH | {"job": "9_0"})], 3, True, "unknown", False,
         "running", ""),
        ([(950, "start", START), (30, "job", SECOND), (1, "end", FINISHED)], 3, False, "unknown", False, "finished",
         "finished"),
        # But it may be the job that continues the run.
        ([(950, "start", START), (940, "end", SAVED), (30, "job", SECOND)], 3, False, "there", False, "starting", ""),
        # A STOP file: nothing will start.
        ([], 0, False, "unknown", True, "stopped", STAYS_STOPPED),
        ([(900, "job", SECOND)], 0, False, "unknown", True, "stopped", STAYS_STOPPED),
        ([(30, "job", SECOND)], 0, False, "unknown", True, "stopped", STAYS_STOPPED),
        ([(950, "start", START), (940, "end", SAVED), (30, "job", SECOND)], 3, False, "unknown", True, "stopped",
         STAYS_STOPPED),
        ([(950, "start", START), (940, "end", FINISHED)], 3, False, "unknown", True, "finished", "finished"),
        ([(950, "start", START)], 3, True, "unknown", True, "running", ""),
        # Silent, and Slurm shows why.
        ([(900, "start", START)], 0, True, "gone", False, "failed", NOTHING_REPORTED),
        ([(900, "start", START)], 0, True, "pending", False, "requeued", "its job waits in Slurm's queue again"),
        # Requeued, and cancelled while it waited.
        ([(9, "start", START), (2, "end", SAVED), (1, "requeue", {"job": "7_0"})], 3, False, "gone", False, "stopped",
         "job 7, queued to start it again, no longer exists: cancelled? Before: told to terminate"),
        # Slurm itself started the job again after a node had failed: no end was written.
        ([(900, "start", START), (30, "job", JOB | {"job": "7_1"})], 3, True, "unknown", False, "starting", ""),
    ],
)  # fmt: skip
def test_each_job_and_attempt_is_judged_on_its_own(
    tmp_path: Path,
    events: list[Any],
    steps: int,
    held: bool,
    presence: Presence,
    stop: bool,
    expected: str,
    reason: str,
) -> None:
    folder = run_folder(tmp_path, *events, steps=steps, held=held)
    if stop:
        (folder / "STOP").touch()
    found = status(folder, NOW, with_history=True, presence=presence)
    assert (found["state"], found["reason"]) == (expected, reason)
    assert f"run: {expected}" in _as_text(found)


@pytest.mark.parametrize(
    ("submitted", "lines", "state", "job"),
    [
        (["7"], ["7|PENDING|N/A|N/A||Priority"], "pending", "7"),
        (["7"], ["7|PENDING|N/A|N/A||JobHeldUser"], "held", "7"),
        (["7"], ["7|RUNNING|1|2|n1|None"], "starting", "7"),
        (["7"], [], "new", None),
        (["7", "8"], ["7|CANCELLED|1|2||None", "8|PENDING|N/A|N/A||Priority"], "pending", "8"),
        (["12_3"], ["12_1|RUNNING|1|2|n1|None", "12_3|PENDING|N/A|N/A||Resources"], "pending", "12_3"),
        (["12_3"], ["12_1|PENDING|N/A|N/A||Resources"], "new", None),
    ],
)  # fmt: skip
def test_a_job_that_was_submitted_and_has_not_started_is_found(
    tmp_path: Path, submitted: list[str], lines: list[str], state: str, job: str | None
) -> None:
    folder = run_folder(tmp_path, *((9, "submit", {"job": id_}) for id_ in submitted), held=False)
    queue = squeue(*lines)
    assert set(run_status.jobs(folder)) == set(submitted)
    queue.load(run_status.jobs(folder))
    found = run_status.brief(folder, NOW, queue)
    assert (found["state"], found["job"] and found["job"]["id"]) == (state, job)


def test_a_submitted_job_may_wait_if_slurm_does_not_answer(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (9, "submit", {"job": "7"}), held=False)
    found = status(folder, NOW, presence="unknown")
    assert (found["state"], found["job"]) == ("pending", {"id": "7"})
    assert "job 7; Slurm did not answer: whether it still waits is unknown" in _as_text(found)
    # Of a run that has trained, more is known.
    trained = run_folder(tmp_path, (9, "start", START), (8, "end", SAVED), (7, "submit", {"job": "8"}), steps=3,
                         held=False, name="trained")  # fmt: skip
    assert status(trained, NOW, presence="unknown")["state"] == "saved"


def test_a_submitted_job_that_has_started_is_that_start(tmp_path: Path) -> None:
    """Its array still waits; the run's own task has failed."""
    events = [(30, "submit", {"job": "12_3"}), (9, "start", START | {"job": "12_3_0"}),
              (2, "crash", CRASH | {"job": "12_3_0"})]  # fmt: skip
    folder = run_folder(tmp_path, *events, steps=3)  # type: ignore[arg-type]
    queue = squeue("12_4|PENDING|N/A|N/A||Resources")
    queue.load(run_status.jobs(folder))
    assert run_status.brief(folder, NOW, queue)["state"] == "failed"
    # Submitted again, to continue.
    run_folder_module.record(folder, "submit", job="20")
    queue = squeue("20|PENDING|N/A|N/A||Resources")
    queue.load(run_status.jobs(folder))
    assert run_status.brief(folder, NOW, queue)["state"] == "pending"


WENT_BACK = {"attempt": 2, "step": 4, "from_step": 9, "aside": "newer_than_000000004.g0002"}


def test_a_run_that_went_back_is_at_that_step_with_that_checkpoint(tmp_path: Path) -> None:
    """`hpcgpt checkpoint back` on a finished run; then an attempt continues from there, and is killed."""
    save = [(n, "save", {"attempt": 1, "step": step}) for n, step in ((50, 4), (45, 9))]
    before: list[tuple[float, str, dict[str, Any]]] = [(90, "start", START), *save, (40, "end", FINISHED)]
    folder = run_folder(tmp_path, *before, steps=9, held=False)
    assert (status(folder, NOW)["checkpoint_step"], status(folder, NOW)["state"]) == (9, "finished")
    run_folder_module.record(folder, "went_back", **WENT_BACK)
    found = status(folder, NOW)
    assert (found["state"], found["reason"]) == ("saved", "went back to step 4")
    assert (found["step"], found["checkpoint_step"], found["val_step"]) == (4, 4, None)
    again = START | {"attempt": 3, "step": 4, "lost_steps": 5}
    run_folder_module.record(folder, "start", **again)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 8):
            attempt = 1 if step < 5 else 3
            row = {"step": step, "time": NOW + step, "attempt": attempt, "train/step_s": 1.0}
            file.write(json.dumps(row) + "\n")
    found = status(folder, NOW, with_history=True)
    assert (found["state"], found["step"], found["checkpoint_step"]) == ("failed", 7, 4)
    first, last = found["history"]
    assert (first["to_step"], first["lost_steps"], first["went_back"]) == (9, 5, [])
    # Its steps 5 to 7 are after the newest checkpoint, though one of step 9 was made once.
    assert (last["from_step"], last["to_step"], last["lost_steps"]) == (4, 7, 3)
    assert [event["step"] for event in last["went_back"]] == [4]
    assert "went back from step 9 to step 4" in _as_text(found)
    assert why.lines(found)[-1].split("+0")[-1].split(maxsplit=2)[2].startswith("went back to step 4; nothing reported")


@pytest.mark.parametrize("every", [0, 300])
def test_a_run_that_went_back_by_many_steps_has_the_figures_of_that_step(tmp_path: Path, every: int) -> None:
    """Its row is far from the end of metrics.jsonl, of which only the end is read otherwise."""
    before: list[tuple[float, str, dict[str, Any]]] = [
        (2000, "start", START | {"total_steps": 1000}), (40, "end", FINISHED | {"step": 1000})
    ]  # fmt: skip
    folder = run_folder(tmp_path, *before, held=False)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 1001):
            row = {"step": step, "time": NOW - 1100 + step, "attempt": 1, "tokens": 8 * step}
            row |= {"train/loss": 9 - step / 200, "train/step_s": 1.0 if step <= 700 else 3.0}
            print(json.dumps(row | ({"val/loss": step / 100} if every and step % every == 0 else {})), file=file)
    run_folder_module.record(folder, "went_back", attempt=2, step=700, from_step=1000, aside="x")
    for found in (status(folder, NOW), run_status.brief(folder, NOW)):
        assert (found["step"], found["tokens"], found["train/loss"]) == (700, 5600, 5.5)
        assert (found["val/loss"], found["val_step"]) == ((6.0, 600) if every else (None, None))
        assert (found["step_s"], found["time_left_s"], found["last_step_age_s"]) == (1.0, 300.0, 400.0)
    # Where that row is damaged, the step is that of the checkpoint nevertheless.
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[699] = "{\n"
    (folder / "metrics.jsonl").write_text("".join(lines))
    found = status(folder, NOW)
    assert (found["step"], found["tokens"]) == (700, 5592)
    (folder / "metrics.jsonl").unlink()
    assert (status(folder, NOW)["step"], status(folder, NOW)["train/loss"]) == (700, None)


def test_the_newest_checkpoint_is_the_one_that_a_start_would_use() -> None:
    def event(name: str, step: int) -> dict[str, Any]:
        return {"event": name, "time": 1.0, "step": step}

    found = [event("start", 0), event("save", 4), event("save", 8)]
    assert attempts.newest_checkpoint(found[:1]) is None
    assert attempts.newest_checkpoint(found) == 8
    assert attempts.newest_checkpoint([*found, event("rollback", 4)]) == 4
    assert attempts.newest_checkpoint([*found, event("start", 4)]) == 4  # that of step 8 was damaged
    assert attempts.newest_checkpoint([*found, event("went_back", 4), event("start", 4), event("save", 6)]) == 6


def test_slurm_is_believed_sooner_than_silence_but_a_heartbeat_more_than_slurm(tmp_path: Path) -> None:
    """Steps of a minute: a run may be silent for 20 of them. Another cluster on the same disk has no such job."""
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"train/step_s": 1.0', '"train/step_s": 60.0'))
    assert [status(folder, NOW + later, presence="gone")["state"] for later in (20, 40)] == ["running", "failed"]
    assert status(folder, NOW + 40, presence="pending")["state"] == "requeued"
    assert status(folder, NOW + 40, presence="there")["state"] == "running"
    beat = folder / "generations/000001.alive"
    beat.write_text("9")
    os.utime(beat, (NOW + 39, NOW + 39))
    assert status(folder, NOW + 40, presence="gone")["state"] == "running"
    assert status(folder, NOW + 80, presence="gone")["state"] == "failed"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("squeue", "expected"),
    [
        ("true", "stopped"),
        ("echo '7|CANCELLED|1|2||None'", "stopped"),
        ("echo '7|PENDING|N/A|N/A||Resources'", "requeued"),
        ("echo '7|PENDING|N/A|N/A||JobHeldUser'", "held"),
        ("echo '7|RUNNING|1|2|n1|None'", "starting"),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", "starting"),
        (None, "starting"),
    ],
)
def test_the_command_asks_slurm_about_the_job(tmp_path: Path, squeue: str | None, expected: str) -> None:
    folder = run_folder(tmp_path, held=False)
    run_folder_module.record(folder, "job", job="7_0")
    tools = tmp_path / "bin"
    tools.mkdir()
    if squeue is not None:
        expected_arguments = "--all --noheader --array --states=all --jobs=7,7 --format=%i|%T|%S|%e|%N|%r"
        (tools / "squeue").write_text(f"#!/bin/sh\n[ \"$*\" = '{expected_arguments}' ] || exit 9\n{squeue}\n")
        (tools / "squeue").chmod(0o755)
    done = command("hpcgpt.status", "--json", str(folder), env={"PATH": str(tools)})
    assert json.loads(done.stdout)["state"] == expected


def test_the_job_of_a_running_run_has_its_nodes_and_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    queue = squeue(f"7|RUNNING|1|{NOW + 3600:.0f}|n[1-2]|None")
    queue.load(["7"])
    at = time.strftime("%H:%M", time.localtime(NOW + 3600))
    assert f"\n  job 7 on n[1-2], until {at}\n" in _as_text(run_status.complete(folder, NOW, queue))
    assert "\n  job 7 on n[1-2]\n" in _as_text(status(folder, NOW))


def test_a_clock_that_was_set_back_gives_no_negative_times(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    found = status(folder, NOW - 600, with_history=True)
    assert (found["state"], found["last_step_age_s"], found["still_s"]) == ("running", 0, 0)
    assert found["goodput"]["total_s"] == 900


def test_the_limit_of_silence_follows_the_runs_steps_and_evaluations(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    assert [status(folder, NOW + later)["state"] for later in (100, 140)] == ["running", "stale"]
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"train/step_s": 1.0', '"train/step_s": 60.0'))
    assert [status(folder, NOW + later)["state"] for later in (140, 1100, 1300)] == ["running", "running", "stale"]
    (folder / "metrics.jsonl").write_text(text.replace('"tokens": 1,', '"tokens": 1, "val/elapsed_s": 400,'))
    assert [status(folder, NOW + later)["state"] for later in (140, 790, 810)] == ["running", "running", "stale"]


def test_a_single_slow_evaluation_does_not_raise_the_limit_forever(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=12)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        row["val/elapsed_s"] = 5000.0 if row["step"] == 2 else 100.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    assert status(folder, NOW + 2000)["state"] == "running"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [status(folder, NOW + later)["state"] for later in (290, 310)] == ["running", "stale"]


# Acquires the lease and ends without a report.
ACQUIRE_AND_DIE = """
import os, sys
from pathlib import Path
from hpcgpt.storage import lease
lease.acquire(Path(sys.argv[1]), "7_0")
os._exit(0)
"""


def lease_of_dead_process(folder: Path) -> dict[str, Any]:
    """Let a process acquire the lease and end without a report; return the file that it wrote."""
    (folder / "generations/000001.json").unlink()
    subprocess.run([sys.executable, "-c", ACQUIRE_AND_DIE, folder], cwd=ROOT, env=clean_env(), check=True)
    return dict(json.loads((folder / "generations/000001.json").read_text()))


@pytest.mark.processes
def test_a_dead_holder_whose_pid_was_reused_is_recognized(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    holder = lease_of_dead_process(folder)
    assert status(folder, NOW)["state"] == "failed"
    (folder / "generations/000001.json").write_text(json.dumps(holder | {"pid": os.getpid()}))
    assert status(folder, NOW)["state"] == "failed"


@pytest.mark.processes
@pytest.mark.parametrize("other", [{"pid_namespace": 1}, {"boot": "another kernel"}])
def test_a_holder_in_another_container_of_this_host_is_not_considered_dead(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    """Its pid, which no process has here, may exist there."""
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    holder = lease_of_dead_process(folder)
    (folder / "generations/000001.json").write_text(json.dumps(holder | other))
    assert status(folder, NOW)["state"] == "running"


@pytest.mark.processes
@pytest.mark.parametrize("holder", ['{"pid": "x"}', '{"pid": 1e300}', "[" * 100_000, "3"])
def test_a_damaged_lease_file_does_not_make_a_run_stopped(tmp_path: Path, holder: str) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    undamaged = lease_of_dead_process(folder)
    if holder.startswith("{"):
        holder = json.dumps(undamaged | json.loads(holder))
    (folder / "generations/000001.json").write_text(holder)
    assert status(folder, NOW)["state"] == "running"


def test_a_silent_run_with_a_living_rank_0_is_reported_as_waiting(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    beat, log = folder / "generations/000001.alive", folder / "logs/7_0.log"
    beat.write_text("9")
    os.utime(beat, (NOW + 498, NOW + 498))
    log.touch()
    text = _as_text(status(folder, NOW + 500))
    assert "rank 0 is alive: it waits for a rank, a disk or the network" in text
    assert f"look at {log}" in text
    assert "faults" not in text
    (folder / "faults").mkdir()
    assert f"look at {log} and {folder / 'faults'}" in _as_text(status(folder, NOW + 500))


@pytest.mark.parametrize(
    ("presence", "beat_ago_s", "counted_s"),
    [
        ("unknown", 30 * 86400, 900 + 60),  # a copy on a laptop: the time ends with the last heartbeat
        ("unknown", 3000, 900 + 30 * 86400 + 60),  # it may be back: a node that is out of reach, or suspended
        ("there", 30 * 86400, 900 + 30 * 86400 + 60),  # Slurm says that the job still runs
        ("unknown", None, 900),  # no heartbeat is there: the last record
    ],
)
def test_where_slurm_cannot_be_asked_the_time_of_a_dead_run_ends_with_its_heartbeat(
    tmp_path: Path, presence: Presence, beat_ago_s: float | None, counted_s: float
) -> None:
    folder, now = run_folder(tmp_path, (900, "start", START), steps=3), NOW + 30 * 86400 + 60
    if beat_ago_s is not None:
        beat = folder / "generations/000001.alive"
        beat.write_text("9")
        os.utime(beat, (now - beat_ago_s, now - beat_ago_s))
    found = status(folder, now, with_history=True, presence=presence)
    assert (found["state"], found["still_s"]) == ("stale", now - NOW)
    assert found["goodput"]["total_s"] == counted_s
    (attempt,) = found["history"]
    assert attempt["ended_at"] - attempt["began_at"] == counted_s


def test_a_job_that_starts_again_after_a_lease_was_held_is_starting(tmp_path: Path) -> None:
    """Slurm has started the job, and the batch script has written nothing yet."""
    folder = run_folder(tmp_path, (900, "start", START), (500, "end", SAVED), (400, "submit", {"job": "8"}), held=False)
    (folder / "generations/000001.alive").write_text("9")
    found = status(folder, NOW, with_history=True, presence="there")
    assert (found["state"], found["still_s"]) == ("starting", None)
    assert found["heartbeat_age_s"] is not None


def test_a_job_whose_ranks_never_report_does_not_revive_the_attempt_before_it(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path, (2000, "start", START), (1500, "end", SAVED), (1000, "job", {"job": "7_1"}), held=False
    )
    found = status(folder, NOW, with_history=True, presence="there")
    assert found["state"] == "stale"
    (attempt,) = found["history"]
    assert (attempt["running"], attempt["ended_at"], attempt["reason"]) == (False, NOW - 1500, SAVED["reason"])
    assert found["goodput"]["restart_s"] == 1000


def test_an_error_that_ended_a_run_is_its_reason(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3, held=False)
    run_folder_module.write_exit(folder, run_folder_module.Exit("7_0", 1, "training has diverged", 0, saved=False))
    assert status(folder, NOW)["reason"] == "training has diverged"
    os.utime(folder / "exit.json", (NOW - 1000, NOW - 1000))  # from an earlier attempt
    assert status(folder, NOW)["reason"] == NOTHING_REPORTED


def test_the_history_shows_each_attempt_and_the_first_failure(tmp_path: Path) -> None:
    slow = {"attempt": 1, "step": 2, "rank": 3, "host": "n2", "local_s": 0.4, "usual_s": 0.1, "factor": 4.0}
    folder = run_folder(
        tmp_path,
        (300, "job", JOB),
        (200, "start", START | {"lost_steps": 0}),
        (150, "straggler", slow),
        (145, "save", {"attempt": 1, "step": 2, "seconds": 1.0}),
        (140, "save_failed", {"attempt": 1, "step": 4, "problem": "no room on n1"}),
        (130, "hang", {"attempt": 1, "step": 5, "rank": 1, "host": "n1", "silent_s": 90}),
        (100, "crash", CRASH),
        (99, "requeue", {"job": "7_0", "reason": CRASH["reason"]}),
        (90, "job", JOB | {"job": "7_1", "started_at": NOW - 91, "hosts": ["n1", "n3"]}),
        (80, "crash", {"job": "7_1", "status": 2, "reason": "crash 2: rank 3 is missing", "rank": None, "host": None}),
        (79, "requeue", {"job": "7_1", "reason": "crash 2"}),
        (70, "job", JOB | {"job": "7_2", "started_at": NOW - 71}),
        (60, "start", START | {"attempt": 2, "job": "7_2", "step": 2, "lost_steps": 3, "lost_s": 9.0}),
        (5, "stop", {"attempt": 2, "step": 8, "reason": "the time limit is near"}),
        (1, "end", {"attempt": 2, "status": 75, "step": 8, "reason": "the time limit is near"}),
        held=False,
    )
    found = status(folder, NOW, with_history=True)
    assert [(e["attempt"], e["job"]) for e in found["history"]] == [(1, "7_0"), (None, "7_1"), (2, "7_2")]
    first, never, second = found["history"]
    assert (first["from_step"], first["to_step"], first["lost_steps"], first["checkpoints"]) == (0, 5, 3, [2])
    assert (second["from_step"], second["to_step"], second["lost_steps"]) == (2, 8, 0)
    assert never["reason"] == "crash 2: rank 3 is missing"
    lines = [line.strip() for line in _as_text(found).splitlines()]
    for expected in (
        "steps 0 to 5, of which 3 were lost; checkpoints: 2",
        "step 2: rank 3 on n2 takes 4.0 times as long as usual, and the other ranks wait for it",
        "step 4: not saved: no room on n1",
        "step 5: rank 1 on n1 hung for 1.5 min",
        "ended: crash 1: rank 3 was killed",
        "first to fail: rank 3 on n2",
        "excluded from later starts: n2",
        "started again: crash 2",
        "step 8: asked to stop: the time limit is near",
    ):
        assert expected in lines
    began = [line.split(",")[0] for line in lines if line.startswith(("attempt ", "no attempt"))]
    assert began == ["attempt 1", "no attempt", "attempt 2"]
    json.dumps(found)
