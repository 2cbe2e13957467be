"""The state of a run, and the reason for it.

It follows from the newest attempt and from the jobs that began after it. Each is considered by itself, so that a second
job that was refused does not change the state of the attempt that is running. If the run folder does not show whether
a job still exists, Slurm is asked (`presence_of`); without Slurm, elapsed time decides.

    new        nothing has started yet
    imported   it holds the weights of another program, and no run trains in it (hpcgpt.import_weights)
    pending    a job for it waits in Slurm's queue
    starting   its job has started, its ranks have not reported yet
    running    it has written something recently
    stale      it should be running, but has written nothing for much longer than a step or an evaluation takes
    finished   all steps are done
    saved      it saved before the end and exited; it continues when it is started again
    requeued   the same, or it crashed, and it waits in Slurm's queue for its next start
    held       the same, or pending, but its job is held: it waits until a person releases it
    stopped    a person stopped it: scancel, or a STOP file
    failed     it ended with an error, was killed, or the requeue policy gave it up

No torch in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcgpt import exit_codes
from hpcgpt.run import attempts, run_folder
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm.queue import EVERY_S, Presence, id_of
from hpcgpt.slurm.requeue_policy import CANCELLED
from hpcgpt.storage import lease

Name = Literal[
    "new", "imported", "pending", "starting", "running", "stale", "finished", "saved", "requeued", "held", "stopped",
    "failed",
]  # fmt: skip
ALIVE: tuple[Name, ...] = ("starting", "running", "stale")
WAITING: tuple[Name, ...] = ("pending", "requeued", "held")
# A run is not stale before this long, and before its first step, in which a model may be compiled, not before that.
SILENT_S, SILENT_AT_START_S = 120.0, 600.0
RECENT_EVALUATIONS = 5
NOTHING_REPORTED = "nothing reported: killed, or its node failed"
WEIGHTS_ALONE = "weights of another program; a run of its own trains on from them"
STOP_FILE = "a STOP file keeps it stopped"
NEWEST_JOBS, NEWEST_SUBMISSIONS = 2, 5


@dataclass(frozen=True)
class State:
    """`still_s`: seconds since a run that should be running wrote something; None if it should not. `job`: the Slurm
    job that the state is about, '' if there is none. `before_ranks`: that job has started, its ranks have not reported.
    """

    name: Name
    reason: str = ""
    still_s: float | None = None
    job: str = ""
    before_ranks: bool = False


def find(
    folder: Path, events: Sequence[Row], rows: Sequence[Row], now: float,
    ask: Callable[[str], Presence] | None = None,
) -> State:  # fmt: skip
    """Find the state of the run in `folder`. `ask` is `Queue.presence`, or None to leave Slurm out.

    Of `rows` only those at the end matter: the last one, and the last evaluations.
    """
    ask = ask or _is_unknown
    starts = attempts.starts(events, rows)
    start = starts[-1] if starts else {}
    since = _events_since(start, events)
    end, position = _end_event(start, since)
    if not start and not end and (folder / run_folder.IMPORTED).exists():
        return State("imported", WEIGHTS_ALONE)
    if start and not end and _is_held(folder) and not _was_started_again(start, since):
        alive = _of_attempt(folder, start, events, rows, now, ask)
        if alive:
            return alive
    state = _of_ended(folder, start, end) if start or end else State("new")
    if state.name == "finished" and (step := attempts.went_back_to(events)) is not None:
        state = State("saved", f"went back to step {step:,}")
    if state.name == "saved":
        state = _given_up(state, end, since[position:])
    # A job that began before this attempt had ended was refused.
    state = _of_later_jobs(folder, state, since[position:], now, ask)
    state = _of_submitted_jobs(state, events, ask)
    if state.name in ("new", "saved", "stopped", "failed", *WAITING) and (folder / "STOP").exists():
        return State("stopped", STOP_FILE, job=state.job)
    return state


def jobs(events: Sequence[Row]) -> list[str]:
    """List the Slurm jobs on which the state of a run may depend, by Slurm's ids: the newest ones that it had, unless
    it is finished, and those that were submitted for it.
    """
    found: dict[str, None] = {}
    for event in reversed(events):
        if len(found) == NEWEST_JOBS or (event["event"] == "end" and event.get("status") == exit_codes.FINISHED):
            break
        job = event.get("next_job") or event.get("job")
        if job and event["event"] != "submit":
            found[id_of(str(job))] = None
    return list(dict.fromkeys([*found, *_submitted(events)]))


def heartbeat_age_s(folder: Path, now: float) -> float | None:
    """Return the seconds since rank 0's last heartbeat (hpcgpt.storage.lease); None if there is none.

    The file has the time of its file system, so a wrong clock of the node does no harm.
    """
    with suppress(OSError):
        beats = sorted((folder / "generations").glob("[0-9]*.alive"))
        return max(0.0, now - beats[-1].stat().st_mtime) if beats else None
    return None


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
    folder: Path, start: Row, events: Sequence[Row], rows: Sequence[Row], now: float, ask: Callable[[str], Presence]
) -> State | None:  # fmt: skip
    """Find the state of an attempt that has recorded no end; None if it has ended nevertheless."""
    number = start.get("attempt")
    signs = [start["time"], *(event["time"] for event in events if event.get("attempt") == number)]
    own = bool(rows) and rows[-1].get("attempt", number) == number
    signs += [row["time"] + attempts.evaluation_s(row) for row in rows[-1:] if own]
    still_s = max(0.0, now - max(signs))
    stepped = own and rows[-1]["time"] > start["time"]
    patience_s = max(
        SILENT_S, 20 * (usual_step_s(rows) or 0.0), 2 * _evaluation_s(rows), 0.0 if stepped else SILENT_AT_START_S
    )
    job = id_of(start.get("job", ""))
    # What is newer than Slurm's answer may be counts more. (And a cluster that shares the disk does not have this job.)
    beat_s = heartbeat_age_s(folder, now)
    presence = ask(job) if min(still_s, still_s if beat_s is None else beat_s) > EVERY_S else "unknown"
    if presence in ("pending", "held"):
        return State("held" if presence == "held" else "requeued", "its job waits in Slurm's queue again", job=job)
    if presence == "gone":
        return None
    return State("running" if still_s <= patience_s else "stale", still_s=still_s, job=job)


def _evaluation_s(rows: Sequence[Row]) -> float:
    """Return the longest of the last few evaluations; 0 if there was none. So a single slow one is soon forgotten."""
    took = [seconds for row in rows if (seconds := attempts.evaluation_s(row))]
    return max(took[-RECENT_EVALUATIONS:], default=0.0)


def _of_ended(folder: Path, start: Row, end: Row) -> State:
    if end:
        reason = str(end.get("reason", ""))
        if end["event"] == "end":
            names: dict[int, Name] = {exit_codes.FINISHED: "finished", exit_codes.AGAIN: "saved"}
            return State(names.get(end.get("status", -1), "failed"), reason)
        return State("stopped" if reason == CANCELLED else "failed", reason)
    # An attempt that ends with an error records it there last, if it held the lease.
    ended = run_folder.read_exit(folder)
    with suppress(OSError):
        if ended and (folder / "exit.json").stat().st_mtime >= start["time"]:
            return State("failed", str(ended.reason))
    return State("failed", NOTHING_REPORTED)


def _given_up(saved: State, end: Row, later: Sequence[Row]) -> State:
    """Return the state of an attempt that saved, if its job is not started again: cancelled, or given up."""
    step = f"; saved at step {end['step']:,}" if "step" in end else ""
    for event in later:
        if event["event"] == "job":
            break
        if event["event"] == "no_requeue":
            reason = str(event.get("reason", ""))
            return State("stopped" if reason == CANCELLED else "failed", f"{reason}{step}")
    return saved


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
            state, began = _refused(before, str(event.get("reason", "")), name), None
        elif name == "crash" and "attempt" not in event and before.name == "new":
            state = State("failed", str(event.get("reason", "")))
        elif name in ("requeue", "chain"):
            began = None
            state = _waiting(state, event, ask)
    if began is None:
        return state
    return _starting(folder, before, began, now, ask)


def _refused(before: State, reason: str, event: str = "") -> State:
    """Return the state after a job that did not train; a finished run stays finished."""
    if before.name == "finished":
        return before
    stopped = reason in (CANCELLED, STOP_FILE) or not event
    return State("stopped" if stopped else "failed", reason)


def _waiting(state: State, event: Row, ask: Callable[[str], Presence]) -> State:
    job = id_of(str(event.get("next_job") or event.get("job", "")))
    reason = state.reason or str(event.get("reason", ""))
    presence = ask(job)
    if presence == "gone":
        return State("stopped", f"job {job}, queued to start it again, no longer exists: cancelled? Before: {reason}")
    return State("held" if presence == "held" else "requeued", reason, job=job)


def _starting(folder: Path, before: State, began: Row, now: float, ask: Callable[[str], Presence]) -> State:
    job = id_of(began.get("job", ""))
    still_s = max(0.0, now - began["time"])
    ended = run_folder.read_exit(folder)
    if ended and ended.attempt == began.get("job", ""):
        return _refused(before, str(ended.reason), "end")
    presence = ask(job)
    if presence in ("pending", "held"):
        return State("held" if presence == "held" else "requeued", before.reason, job=job)
    if presence == "gone":
        return _refused(before, f"job {job} was cancelled, or ended, before training began")
    if presence == "unknown" and (folder / "STOP").exists():
        return _refused(before, STOP_FILE)
    if still_s <= SILENT_AT_START_S:
        return State("starting", still_s=still_s, job=job, before_ranks=True)
    if presence == "unknown" and before.name == "finished":
        return before
    return State("stale", still_s=still_s, job=job, before_ranks=True)


# --- jobs that have not started yet ------------------------------------------------------------------


def _submitted(events: Sequence[Row]) -> list[str]:
    """List the jobs that were submitted for this run and of which no start is on record, the newest first.

    `hpcgpt submit` records an event `submit`, with Slurm's id of the job, or of a task of an array ('12_3').
    """
    started = {id_of(str(event.get("job", ""))) for event in events if event["event"] in ("job", "start", "chain")}
    named = [str(event["job"]) for event in events if event["event"] == "submit" and "job" in event]
    return [job for job in reversed(dict.fromkeys(named)) if job not in started][:NEWEST_SUBMISSIONS]


def _of_submitted_jobs(state: State, events: Sequence[Row], ask: Callable[[str], Presence]) -> State:
    """Return `pending`, `held` or `starting` if a job that was submitted for this run waits, or has just started."""
    if state.name in (*ALIVE, *WAITING):
        return state
    for job in _submitted(events):
        presence = ask(job)
        if presence in ("pending", "held"):
            return State(presence, job=job)
        if presence == "there":
            return State("starting", job=job, before_ranks=True)
        if presence == "unknown" and state.name == "new":
            return State("pending", job=job)  # as far as is known
    return state


def _is_unknown(_job: str) -> Presence:
    return "unknown"
