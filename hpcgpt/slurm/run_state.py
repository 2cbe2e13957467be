"""What state a run is in, and why.

It follows from its newest attempt, and from the jobs that began after that one: each is looked at on its own, so that
a second job that was refused says nothing about the attempt that it found. Where the run folder leaves open whether a
job is still there, Slurm is asked (`job_is`); without Slurm, time has to do.

    new        nothing has started yet
    starting   its job has started, its ranks have not said so yet
    running    it has given a sign of life lately
    silent     it should be running, but has been still for much longer than a step or an evaluation takes
    finished   all steps are done
    saved      it saved before the end and left; it continues when it is started again
    queued     the same, or it crashed, and the batch script has asked Slurm to start it again
    stopped    a failure, or a person's doing

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

ALIVE = ("starting", "running", "silent")
# How long a run may be still: at the very least, and before its first step, in which a model may be compiled.
SILENT_S, SILENT_AT_START_S = 120.0, 600.0
RECENT_EVALUATIONS = 5
NO_WORD = "no word: killed, or its node failed"
STAYS_STOPPED = "a STOP file asks it to stay so"
_OVER = {
    *("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "REVOKED"),
}

Presence = Literal["pending", "there", "gone", "unknown"]


@dataclass(frozen=True)
class State:
    """`still_s`: seconds since the last sign of life of what should be going; None if nothing should."""

    name: str
    reason: str = ""
    still_s: float | None = None


def find(
    folder: Path, events: Sequence[Row], rows: Sequence[Row], now: float,
    ask: Callable[[str], Presence] | None = None,
) -> State:  # fmt: skip
    """The state of the run in `folder`; `ask` is `job_is`, or None where Slurm is not to be asked."""
    ask = ask or _is_unknown
    starts = attempts.starts(events, rows)
    start = starts[-1] if starts else {}
    since = _events_since(start, events)
    last_word, place = _last_word(start, since)
    if start and not last_word and _is_held(folder) and not _was_started_again(start, since):
        alive = _of_attempt(start, events, rows, now, ask)
        if alive:
            return alive
    state = _of_ended(folder, start, last_word) if start or last_word else State("new")
    # A job that began before this attempt had ended was refused.
    state = _of_later_jobs(folder, state, since[place:], now, ask)
    if state.name in ("new", "saved", "stopped", "queued") and (folder / "STOP").exists():
        return State("stopped", STAYS_STOPPED)
    return state


def usual_step_s(rows: Sequence[Row]) -> float | None:
    """Median seconds of the last hundred steps."""
    recent = sorted(row["train/step_s"] for row in rows[-100:] if "train/step_s" in row)
    return recent[len(recent) // 2] if recent else None


# --- the newest attempt ----------------------------------------------------------------------------


def _events_since(start: Row, events: Sequence[Row]) -> Sequence[Row]:
    """Those after the start of an attempt, in the order in which they were written."""
    for index in range(len(events) - 1, -1, -1):
        if events[index] is start:
            return events[index + 1 :]
    # Its start was never written, as on a full disk: what is its own is known by its number.
    return [event for event in events if not start or event["time"] >= start["time"] or _is_of(event, start)]


def _last_word(start: Row, since: Sequence[Row]) -> tuple[Row, int]:
    """The event that says how an attempt ended, {} if none does, and the number of events up to it.

    The batch script knows of a crash what the attempt itself does not; of all else the attempt knows more.
    """
    for names in (("crash",), ("end",), ("no_requeue",)):
        for place in range(len(since) - 1, -1, -1):
            event = since[place]
            if event["event"] in names and (_is_of(event, start) if start else "attempt" in event):
                return event, place + 1
    return {}, 0


def _is_of(event: Row, start: Row) -> bool:
    """Is this event about that attempt? A crash names its job, and no job where there is none."""
    if "attempt" in event:
        return bool(event["attempt"] == start.get("attempt"))
    return bool(start) and event.get("job", start.get("job")) == start.get("job")


def _was_started_again(start: Row, since: Sequence[Row]) -> bool:
    """Has the batch script, or Slurm itself, started that attempt's job again?"""
    job = start.get("job")
    if not job:
        return False
    id_, restart = _parts(job)
    for event in since:
        if event["event"] in ("requeue", "chain", "no_requeue") and event.get("job") == job:
            return True
        if event["event"] == "job" and _parts(event.get("job", ""))[0] == id_ and event.get("job") != job:
            return _parts(event.get("job", ""))[1] > restart
    return False


def _parts(job: str) -> tuple[str, int]:
    """Slurm's id and the number of the start: '7_1' -> ('7', 1)."""
    id_, _, restart = job.rpartition("_")
    return (id_, int(restart)) if id_ and restart.isdecimal() else (job, 0)


def _is_held(folder: Path) -> bool:
    with suppress(OSError):
        return lease.is_held(folder) and not lease.holder_is_gone(folder)
    return True


def _of_attempt(
    start: Row, events: Sequence[Row], rows: Sequence[Row], now: float, ask: Callable[[str], Presence]
) -> State | None:  # fmt: skip
    """The state of an attempt that has not said that it ended; None if it is over all the same."""
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
    """The longest of the last few evaluations; 0 if there was none. One that was slow once is no measure for ever."""
    took = [seconds for row in rows if (seconds := attempts.evaluation_s(row))]
    return max(took[-RECENT_EVALUATIONS:], default=0.0)


def _of_ended(folder: Path, start: Row, last_word: Row) -> State:
    if last_word:
        name = "stopped"
        if last_word["event"] == "end":
            name = {exit_codes.FINISHED: "finished", exit_codes.AGAIN: "saved"}.get(last_word.get("status", -1), name)
        return State(name, str(last_word.get("reason", "")))
    # An error that is a sentence is written there last, by the one that held the folder.
    ended = run_folder.read_exit(folder)
    with suppress(OSError):
        if ended and (folder / "exit.json").stat().st_mtime >= start["time"]:
            return State("stopped", str(ended.reason))
    return State("stopped", NO_WORD)


# --- the jobs after it -----------------------------------------------------------------------------


def _of_later_jobs(
    folder: Path, before: State, since: Sequence[Row], now: float, ask: Callable[[str], Presence]
) -> State:  # fmt: skip
    """The state that the newest start of a job after an attempt makes of the one that this attempt had left."""
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
    """A job that came to nothing: that leaves a finished run what it is."""
    return before if before.name == "finished" else State("stopped", reason)


def _waiting(state: State, event: Row, ask: Callable[[str], Presence]) -> State:
    job = event.get("next_job") or _parts(event.get("job", ""))[0]
    reason = state.reason or str(event.get("reason", ""))
    if ask(job) == "gone":
        return State("stopped", f"job {job} was queued to start it again, and is gone: cancelled? Before: {reason}")
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
        return _refused(before, f"job {_parts(job)[0]} is gone: it was cancelled, or ended, before training began")
    if presence == "unknown" and (folder / "STOP").exists():
        return _refused(before, STAYS_STOPPED)
    if still_s <= SILENT_AT_START_S:
        return State("starting", still_s=still_s)
    if presence == "unknown" and before.name == "finished":
        return before
    return State("silent", still_s=still_s)


# --- Slurm -----------------------------------------------------------------------------------------


def _is_unknown(_job: str) -> Presence:
    return "unknown"


@cache
def job_is(job: str) -> Presence:
    """What Slurm knows of a job ('7_1', '7'): it waits, it is there, or it is gone. Asked once a job, for 20 s at most.

    Without Slurm, or while it does not answer, that is unknown.
    """
    id_ = _parts(job)[0]
    if not id_.replace("_", "").isdecimal():
        return "unknown"
    done = scontrol.run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={id_}")
    if done.returncode:
        return "gone" if "Invalid job id" in done.stderr else "unknown"
    found = set(done.stdout.split())
    if not found - _OVER:
        return "gone"
    return "pending" if found <= {"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"} else "there"
