"""The state of a run, and the reason for it.

It follows from the newest attempt and from the jobs that began after it. Each is considered by itself, so that a second
job that was refused does not change the state of the attempt that is running. If the run folder does not show whether
a job still exists, Slurm is asked (`presence_of`); without Slurm, elapsed time decides.

    new        nothing has started yet
    starting   its job has started, its ranks have not reported yet
    running    it has written something recently
    silent     it should be running, but has written nothing for much longer than a step or an evaluation takes
    finished   all steps are done
    saved      it saved before the end and exited; it continues when it is started again
    queued     the same, or it crashed, and the batch script has asked Slurm to start it again
    stopped    it failed, or a person stopped it

No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hpcgpt import exit_codes
from hpcgpt.run import attempts, run_folder
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm import scontrol
from hpcgpt.storage import lease

Name = Literal["new", "starting", "running", "silent", "finished", "saved", "queued", "stopped"]
ALIVE: tuple[Name, ...] = ("starting", "running", "silent")
# A run is not silent before this long, and before its first step, in which a model may be compiled, not before that.
SILENT_S, SILENT_AT_START_S = 120.0, 600.0
RECENT_EVALUATIONS = 5
NOTHING_REPORTED = "nothing reported: killed, or its node failed"
STOP_FILE = "a STOP file keeps it stopped"
_OVER = {
    *("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "REVOKED"),
}

Presence = Literal["pending", "there", "gone", "unknown"]


@dataclass(frozen=True)
class State:
    """`still_s`: seconds since a run that should be running wrote something; None if it should not."""

    name: Name
    reason: str = ""
    still_s: float | None = None


def find(
    folder: Path, events: Sequence[Row], rows: Sequence[Row], now: float,
    ask: Callable[[str], Presence] | None = None,
) -> State:  # fmt: skip
    """Find the state of the run in `folder`. `ask` is `presence_of`, or None to leave Slurm out."""
    ask = ask or _is_unknown
    starts = attempts.starts(events, rows)
    start = starts[-1] if starts else {}
    since = _events_since(start, events)
    end, position = _end_event(start, since)
    if start and not end and _is_held(folder) and not _was_started_again(start, since):
        alive = _of_attempt(start, events, rows, now, ask)
        if alive:
            return alive
    state = _of_ended(folder, start, end) if start or end else State("new")
    # A job that began before this attempt had ended was refused.
    state = _of_later_jobs(folder, state, since[position:], now, ask)
    if state.name in ("new", "saved", "stopped", "queued") and (folder / "STOP").exists():
        return State("stopped", STOP_FILE)
    return state


def usual_step_s(rows: Sequence[Row]) -> float | None:
    """Return the median seconds of the last hundred steps."""
    recent = sorted(row["train/step_s"] for row in rows[-100:] if "train/step_s" in row)
    return recent[len(recent) // 2] if recent else None


# --- the newest attempt ----------------------------------------------------------------------------


def _events_since(start: Row, events: Sequence[Row]) -> Sequence[Row]:
    """Return the events after the start of an attempt, in the order in which they were written."""
    for index in range(len(events) - 1, -1, -1):
        if events[index] is start:
            return events[index + 1 :]
    # Its start was never written, as on a full disk: its events are known by its number.
    return [event for event in events if not start or event["time"] >= start["time"] or _is_of(event, start)]


def _end_event(start: Row, since: Sequence[Row]) -> tuple[Row, int]:
    """Return the event that records an attempt's end, {} if there is none, and the number of events up to it.

    About a crash the batch script records more than the attempt itself; about any other end, the attempt.
    """
    for name in ("crash", "end", "no_requeue"):
        for index in range(len(since) - 1, -1, -1):
            event = since[index]
            if event["event"] == name and (_is_of(event, start) if start else "attempt" in event):
                return event, index + 1
    return {}, 0


def _is_of(event: Row, start: Row) -> bool:
    """Is this event about that attempt? A crash event has the job instead, or nothing without Slurm."""
    if "attempt" in event:
        return bool(event["attempt"] == start.get("attempt"))
    return bool(start) and event.get("job", start.get("job")) == start.get("job")


def _was_started_again(start: Row, since: Sequence[Row]) -> bool:
    """Has the batch script, or Slurm itself, started that attempt's job again?"""
    job = start.get("job")
    if not job:
        return False
    id_, restart = _id_and_restart(job)
    for event in since:
        if event["event"] in ("requeue", "chain", "no_requeue") and event.get("job") == job:
            return True
        if event["event"] == "job" and _id_and_restart(event.get("job", ""))[0] == id_ and event.get("job") != job:
            return _id_and_restart(event.get("job", ""))[1] > restart
    return False


def _id_and_restart(job: str) -> tuple[str, int]:
    """Split a start into Slurm's job id and the restart count: '7_1' -> ('7', 1)."""
    id_, _, restart = job.rpartition("_")
    return (id_, int(restart)) if id_ and restart.isdecimal() else (job, 0)


def _is_held(folder: Path) -> bool:
    with suppress(OSError):
        return lease.is_held(folder) and not lease.holder_is_gone(folder)
    return True


def _of_attempt(
    start: Row, events: Sequence[Row], rows: Sequence[Row], now: float, ask: Callable[[str], Presence]
) -> State | None:  # fmt: skip
    """SpikeDetector an attempt that has recorded no end; None if it has ended nevertheless."""
    number = start.get("attempt")
    signs = [start["time"], *(event["time"] for event in events if event.get("attempt") == number)]
    own = bool(rows) and rows[-1].get("attempt", number) == number
    signs += [row["time"] + attempts.evaluation_s(row) for row in rows[-1:] if own]
    still_s = max(0.0, now - max(signs))
    stepped = own and rows[-1]["time"] > start["time"]
    patience_s = max(
        SILENT_S, 20 * (usual_step_s(rows) or 0.0), 2 * _evaluation_s(rows), 0.0 if stepped else SILENT_AT_START_S
    )
    if still_s <= patience_s:
        return State("running", still_s=still_s)
    presence = ask(start.get("job", ""))
    if presence == "pending":
        return State("queued", "its job waits in Slurm's queue again")
    if presence == "gone":
        return None
    return State("silent", still_s=still_s)


def _evaluation_s(rows: Sequence[Row]) -> float:
    """Return the longest of the last few evaluations; 0 if there was none. So a single slow one is soon forgotten."""
    took = [seconds for row in rows if (seconds := attempts.evaluation_s(row))]
    return max(took[-RECENT_EVALUATIONS:], default=0.0)


def _of_ended(folder: Path, start: Row, end: Row) -> State:
    if end:
        name: Name = "stopped"
        if end["event"] == "end":
            names: dict[int, Name] = {exit_codes.FINISHED: "finished", exit_codes.AGAIN: "saved"}
            name = names.get(end.get("status", -1), name)
        return State(name, str(end.get("reason", "")))
    # An attempt that ends with an error records it there last, if it held the lease.
    ended = run_folder.read_exit(folder)
    with suppress(OSError):
        if ended and (folder / "exit.json").stat().st_mtime >= start["time"]:
            return State("stopped", str(ended.reason))
    return State("stopped", NOTHING_REPORTED)


# --- the jobs after it -----------------------------------------------------------------------------


def _of_later_jobs(
    folder: Path, before: State, since: Sequence[Row], now: float, ask: Callable[[str], Presence]
) -> State:  # fmt: skip
    """Follow the jobs that began after an attempt, which left the state `before`; the newest one decides."""
    state, began = before, None
    for event in since:
        name, job = event["event"], event.get("job", "")
        if name == "job":
            began = event
        elif name in ("crash", "no_requeue") and began and job == began.get("job"):
            state, began = _refused(before, str(event.get("reason", ""))), None
        elif name == "crash" and "attempt" not in event and before.name == "new":
            state = State("stopped", str(event.get("reason", "")))
        elif name in ("requeue", "chain"):
            began = None
            state = _waiting(state, event, ask)
    if began is None:
        return state
    return _starting(folder, before, began, now, ask)


def _refused(before: State, reason: str) -> State:
    """Return the state after a job that did not train; a finished run stays finished."""
    return before if before.name == "finished" else State("stopped", reason)


def _waiting(state: State, event: Row, ask: Callable[[str], Presence]) -> State:
    job = event.get("next_job") or _id_and_restart(event.get("job", ""))[0]
    reason = state.reason or str(event.get("reason", ""))
    if ask(job) == "gone":
        return State("stopped", f"job {job}, queued to start it again, no longer exists: cancelled? Before: {reason}")
    return State("queued", reason)


def _starting(folder: Path, before: State, began: Row, now: float, ask: Callable[[str], Presence]) -> State:
    job = began.get("job", "")
    still_s = max(0.0, now - began["time"])
    ended = run_folder.read_exit(folder)
    if ended and ended.attempt == job:
        return _refused(before, str(ended.reason))
    presence = ask(job)
    if presence == "pending":
        return State("queued", before.reason)
    if presence == "gone":
        return _refused(before, f"job {_id_and_restart(job)[0]} was cancelled, or ended, before training began")
    if presence == "unknown" and (folder / "STOP").exists():
        return _refused(before, STOP_FILE)
    if still_s <= SILENT_AT_START_S:
        return State("starting", still_s=still_s)
    if presence == "unknown" and before.name == "finished":
        return before
    return State("silent", still_s=still_s)


# --- Slurm -----------------------------------------------------------------------------------------


def _is_unknown(_job: str) -> Presence:
    return "unknown"


@cache
def presence_of(job: str) -> Presence:
    """Ask Slurm whether a job ('7_1', '7') is pending, there or gone; once a job, for at most 20 s.

    Without Slurm, or if it does not answer, the result is "unknown".
    """
    id_ = _id_and_restart(job)[0]
    if not id_.replace("_", "").isdecimal():
        return "unknown"
    done = scontrol.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={id_}")
    if done.returncode:
        return "gone" if "Invalid job id" in done.stderr else "unknown"
    found = set(done.stdout.split())
    if not found - _OVER:
        return "gone"
    return "pending" if found <= {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"} else "there"
