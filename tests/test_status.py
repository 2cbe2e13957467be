"""hpcgpt.status: the state of a run, from its folder alone."""

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
from hpcgpt.run import run_folder as run_folder_module
from hpcgpt.slurm.run_state import NOTHING_REPORTED, Presence
from hpcgpt.status import _as_text, status
from tests.programs import ROOT, clean_env, command
from tests.tiny_run import rows


@pytest.mark.processes
def test_a_finished_run_is_shown_as_text_and_in_json(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny)).returncode == 0
    folder = tmp_path / "runs" / "tiny"
    done = command("hpcgpt.status", str(folder))
    assert done.returncode == 0
    assert f"{folder}: finished (finished)\n  step 12 of 12" in done.stdout
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
def test_a_run_is_running_then_silent_then_stopped_by_a_kill_then_finished(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    command_line = [sys.executable, "-m", "hpcgpt.train", str(tiny), "--train.steps", "3000"]
    with subprocess.Popen(command_line, cwd=ROOT, env=clean_env(), stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL) as process:  # fmt: skip
        deadline = time.monotonic() + 60
        while len(run_folder_module.read_rows(folder / "metrics.jsonl")) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)  # so that it stays at one step while it is read
        alive = status(folder, time.time())
        later = status(folder, time.time() + 1000)
        process.kill()
    killed = status(folder, time.time() + 1000)
    assert (alive["state"], alive["reason"]) == ("running", "")
    assert (killed["state"], killed["reason"]) == ("stopped", NOTHING_REPORTED)
    assert later["state"] == "silent"
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

NOW = 10_000.0


def run_folder(tmp_path: Path, *events: tuple[float, str, dict[str, Any]], steps: int = 0, held: bool = True) -> Path:
    """Make a run whose events happened the given seconds before NOW; its steps of 1 s end right before NOW."""
    folder = tmp_path / "run"
    run_folder_module.prepare(folder)
    lines = [json.dumps({"time": NOW - ago, "event": name, **fields}) for ago, name, fields in events]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"torn']))
    metrics = [{"step": n, "time": NOW - steps + n, "attempt": 1, "train/step_s": 1.0, "tokens": n, "train/loss": 2.0,
                "train/tokens_per_s": 9.0} for n in range(1, steps + 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"torn')
    (folder / "generations").mkdir()
    # Another host: a process with this pid on this host says nothing about it.
    holder = {"host": "elsewhere", "pid": os.getpid(), "attempt": "7_0"}
    (folder / "generations/000001.json").write_text(json.dumps(holder))
    if not held:
        (folder / "generations/000001.done").touch()
    return folder


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
        ([(700, "job", JOB)], 0, False, "silent", ""),
        ([(300, "job", JOB), (200, "start", START)], 0, True, "running", ""),
        ([(900, "job", JOB), (800, "start", START)], 0, True, "silent", ""),
        ([(900, "start", START)], 3, True, "running", ""),
        ([(900, "start", START)], 3, False, "stopped", NOTHING_REPORTED),
        ([(9, "start", START), (1, "end", SAVED)], 3, False, "saved", "told to terminate"),
        ([(9, "start", START), (2, "end", SAVED), (1, "requeue", {"job": "7_0"})], 3, False, "queued",
         "told to terminate"),
        ([(9, "start", START), (2, "crash", CRASH)], 3, True, "stopped", CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "requeue", {"job": "7_0"})], 3, True, "queued",
         CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "chain", {"job": "7_0", "next_job": "8"})], 3, True, "queued",
         CRASH["reason"]),
        ([(9, "start", START), (2, "crash", CRASH), (1, "job", JOB | {"job": "7_1"})], 3, True, "starting", ""),
        ([(9, "start", START), (1, "end", SAVED | {"status": 0, "reason": "finished"})], 3, False, "finished",
         "finished"),
        ([(9, "start", START), (1, "end", SAVED | {"status": 1, "reason": "no room"})], 3, False, "stopped", "no room"),
    ],
)  # fmt: skip
def test_the_state_follows_from_the_newest_event(
    tmp_path: Path, events: list[Any], steps: int, held: bool, expected: str, reason: str
) -> None:
    found = status(run_folder(tmp_path, *events, steps=steps, held=held), NOW)
    assert (found["state"], found["reason"]) == (expected, reason)
    assert f"run: {expected}" in _as_text(found)


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
        ([(900, "job", SECOND)], 0, False, "there", False, "silent", ""),
        ([(30, "job", SECOND)], 0, False, "pending", False, "queued", ""),
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
        ([(900, "start", START)], 0, True, "gone", False, "stopped", NOTHING_REPORTED),
        ([(900, "start", START)], 0, True, "pending", False, "queued", "its job waits in Slurm's queue again"),
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
    found = status(folder, NOW, with_history=True, ask=lambda _job: presence)
    assert (found["state"], found["reason"]) == (expected, reason)
    assert f"run: {expected}" in _as_text(found)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("squeue", "expected"),
    [
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "stopped"),
        ("echo CANCELLED", "stopped"),
        ("echo PENDING", "queued"),
        ("echo RUNNING", "starting"),
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
        expected_arguments = "--noheader --states=all --format=%T --jobs=7"
        (tools / "squeue").write_text(f"#!/bin/sh\n[ \"$*\" = '{expected_arguments}' ] || exit 9\n{squeue}\n")
        (tools / "squeue").chmod(0o755)
    done = command("hpcgpt.status", "--json", str(folder), env={"PATH": str(tools)})
    assert json.loads(done.stdout)["state"] == expected


def test_a_clock_that_was_set_back_gives_no_negative_times(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    found = status(folder, NOW - 600, with_history=True)
    assert (found["state"], found["last_step_age_s"], found["still_s"]) == ("running", 0, 0)
    assert found["goodput"]["total_s"] == 900


def test_the_limit_of_silence_follows_the_runs_steps_and_evaluations(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=3)
    assert [status(folder, NOW + later)["state"] for later in (100, 140)] == ["running", "silent"]
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"train/step_s": 1.0', '"train/step_s": 60.0'))
    assert [status(folder, NOW + later)["state"] for later in (140, 1100, 1300)] == ["running", "running", "silent"]
    (folder / "metrics.jsonl").write_text(text.replace('"tokens": 1,', '"tokens": 1, "val/elapsed_s": 400,'))
    assert [status(folder, NOW + later)["state"] for later in (140, 790, 810)] == ["running", "running", "silent"]


def test_a_single_slow_evaluation_does_not_raise_the_limit_forever(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (900, "start", START), steps=12)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        row["val/elapsed_s"] = 5000.0 if row["step"] == 2 else 100.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    assert status(folder, NOW + 2000)["state"] == "running"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [status(folder, NOW + later)["state"] for later in (290, 310)] == ["running", "silent"]


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
    assert status(folder, NOW)["state"] == "stopped"
    (folder / "generations/000001.json").write_text(json.dumps(holder | {"pid": os.getpid()}))
    assert status(folder, NOW)["state"] == "stopped"


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
