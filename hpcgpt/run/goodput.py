"""Goodput: what the time of a run was spent on, over all of its attempts and jobs.

Every moment from the first event to the last one (or to now, for a running run) belongs to exactly one kind of time, so
the kinds add up to the total:

    productive   steps that are part of the result
    evaluation   validation
    lost         steps that were repeated because an attempt died after its last checkpoint, everything else since that
                 checkpoint, and the time until its death was noticed; also the steps of a rollback, and those that
                 were repeated because the run went back (checkpoint.step)
    save_stall   training waited for a checkpoint
    restart      from the start of a job or a process to its first step: imports, rendezvous, loading
    compile      the warm-up pass and compilation
    queue        a job of the run waited in the queue: from its submission or requeue to its start
    idle         no job and no attempt: a user had stopped the run, or had not started it again yet
    other        the rest of an attempt: logging, samples, shutdown

Goodput is productive / (total - idle). All intervals that are known are put on one timeline. Where two kinds claim the
same moment, the later one in `KINDS` gets it; a moment without a claim is other within an attempt, queue within a Slurm
job, and idle outside. Only save stalls have a length but no exact position: they take unclaimed time after their step.
Runs of older versions recorded less: what is missing counts as idle, queue or other, and nothing counts twice.

No torch in here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hpcgpt.output.counted import counted
from hpcgpt.run import attempts as attempt_history
from hpcgpt.run import condensed, records
from hpcgpt.run.attempts import Attempt, evaluation_s, step_began_at
from hpcgpt.run.records import Record as Row

# Of two claims to one moment the later one in this list gets it. Idle is never claimed: it is the rest.
KINDS = ("idle", "queue", "restart", "compile", "other", "lost", "evaluation", "productive")
IDLE = "idle: no job queued or running"
SHOWN = {
    "productive_s": "productive",
    "evaluation_s": "evaluation",
    "lost_s": "lost after the last checkpoint",
    "save_stall_s": "waiting for saves",
    "restart_s": "start-up until the first step",
    "compile_s": "warm-up and compile",
    "queue_s": "queue: waiting for Slurm",
    "other_s": "other",
    "idle_s": IDLE,
}


@dataclass(frozen=True)
class Goodput:
    """Seconds by kind, and how many steps were lost in how many attempts."""

    productive_s: float
    evaluation_s: float
    lost_s: float
    save_stall_s: float
    restart_s: float
    compile_s: float
    queue_s: float
    other_s: float
    lost_steps: int
    attempts: int
    idle_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Sum up all time, including idle time."""
        return sum(self.seconds.values())

    @property
    def active_s(self) -> float:
        """Return the time that goodput is a fraction of: all but idle time."""
        return self.total_s - self.idle_s

    @property
    def goodput(self) -> float | None:
        """Return goodput as a fraction; None if there is no active time."""
        return self.productive_s / self.active_s if self.active_s > 0 else None

    @property
    def seconds(self) -> dict[str, float]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in SHOWN}

    def as_dict(self) -> dict[str, Any]:
        """Return the figures by name, for JSON."""
        return {
            "goodput": self.goodput,
            "total_s": self.total_s,
            **self.seconds,
            "lost_steps": self.lost_steps,
            "attempts": self.attempts,
        }

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> Goodput:
        """Build it from what `as_dict` returned, in this version or an older one."""
        return cls(**{item.name: figures[item.name] for item in fields(cls) if item.name in figures})

    def line(self) -> str:
        """Format the figures as one line, the largest cost first, without costs below 0.1 %."""
        costs = {name: seconds for name, seconds in self.seconds.items() if name not in ("productive_s", "idle_s")}
        shares = [(SHOWN[name], seconds / self.active_s if seconds else 0.0) for name, seconds in costs.items()]
        parts = [f"{label} {share:.1%}" for label, share in sorted(shares, key=lambda s: -s[1]) if share >= 0.001]
        idle = f"; idle for {self.idle_s:,.0f} s besides" if self.idle_s >= 1 else ""
        return f"goodput {self.goodput or 0:.1%}: " + (", ".join(parts) or "nothing else") + idle

    def table(self) -> str:
        """Format the figures as a table."""
        if self.goodput is None:
            return "goodput: nothing has been trained yet"
        lost = f", {counted(self.lost_steps, 'step')} lost" if self.lost_steps else ""
        lines = [f"goodput {self.goodput:.1%} over {counted(self.attempts, 'attempt')}{lost}"]
        width = max(len(f"{self.total_s:,.1f}"), 8)
        for name, label in SHOWN.items():
            share = f"{self.seconds[name] / self.active_s:6.1%}" if name != "idle_s" else " " * 5 + "-"
            lines.append(f"  {label:32}{self.seconds[name]:{width},.1f} s  {share}")
        lines.append(f"  {'total':32}{self.total_s:{width},.1f} s")
        return "\n".join(lines)


def table(folder: Path) -> str:
    """Format the table of a run whose newest attempt has ended. Memory does not grow with its steps."""
    events = records.events(folder)
    return measure(events, condensed.timing(folder, events)).table()


def measure(events: Sequence[Row], rows: Sequence[Row], now: float | None = None, stepping: bool = True) -> Goodput:
    """Compute the goodput from the events and rows of a run; `now` in unix seconds if it is running, else None.

    `stepping`: its newest attempt is running; else a job has started whose ranks have not.
    """
    attempts = attempt_history.attempts(events, rows, now if stepping else None)
    moments = [now] if now is not None else []
    for event in events:
        moments += [event[key] for key in ("time", "began_at", "queued_at") if key in event]
    for attempt in attempts:
        moments += [attempt.began_at, attempt.ended_at]
    for row in rows:
        moments += [step_began_at(row), row["time"]]
    timeline = Timeline(min(moments, default=0.0), max(moments, default=0.0))
    about_to_start = now if not stepping else None
    for start, end in _jobs(events, attempts, about_to_start):
        timeline.claim("queue", start, end)
    of_jobs = [event for event in events if event["event"] in ("job", "start", "crash", "left")]
    for index, event in enumerate(of_jobs):
        if event["event"] == "job":
            timeline.claim(
                "restart", event.get("started_at", event["time"]), _job_steps_at(event, of_jobs[index:], about_to_start)
            )
    for index, attempt in enumerate(attempts):
        following = attempts[index + 1] if index + 1 < len(attempts) else None
        _lay_out(timeline, attempt, following)
    seconds = timeline.seconds(stall for attempt in attempts for stall in _stalls(attempt))
    return Goodput(
        **{f"{kind}_s": length for kind, length in seconds.items()},
        lost_steps=sum(attempt.lost_steps + attempt.rolled_back_steps for attempt in attempts),
        attempts=len(attempts),
    )


def _jobs(events: Sequence[Row], attempts: Sequence[Attempt], now: float | None) -> list[tuple[float, float]]:
    """Return (start, end) of each job, in which it was queued or running, over all of its starts.

    A requeued job is in the queue at once; a job that another one submitted, from that one's event on.
    """
    moments: dict[str, list[float]] = {}

    def note(job: str, *times: float) -> None:
        if job:
            moments.setdefault(job.rpartition("_")[0] or job, []).extend(times)

    newest = ""
    for event in events:
        job = event.get("job", "")
        note(job, *(event[key] for key in ("time", "queued_at", "started_at", "began_at") if key in event))
        if event["event"] == "chain":
            note(event.get("next_job", ""), event["time"])
        newest = job if event["event"] == "job" else newest
    for attempt in attempts:
        note(attempt.job, attempt.began_at, attempt.ended_at)
    if now is not None:
        note(newest, now)
    return [(min(times), max(times)) for times in moments.values() if times]


class Timeline:
    """The time between two moments, and the claims of the kinds to it."""

    def __init__(self, first: float, last: float) -> None:
        self._first, self._last = first, last
        self._changes: list[tuple[float, int, int]] = []

    def claim(self, kind: str, start: float, end: float) -> None:
        start, end = max(start, self._first), min(end, self._last)
        if start < end:
            self._changes += [(start, KINDS.index(kind), 1), (end, KINDS.index(kind), -1)]

    def seconds(self, stalls: Iterable[tuple[float, float, float]]) -> dict[str, float]:
        """Sum up the seconds by kind. A stall (start, until, seconds) takes unclaimed time from its start on."""
        pieces = list(self._pieces())
        free = [(start, end - start, kind) for start, end, kind in pieces if kind in ("other", "lost")]
        starts, left = [start for start, _, _ in free], [length for _, length, _ in free]
        ends = [start + length for start, length, _ in free]
        total = dict.fromkeys([*KINDS, "save_stall"], 0.0)
        for start, end, kind in pieces:
            total[kind] += end - start
        for start, until, seconds in stalls:
            index = bisect_right(ends, start)
            while seconds > 0 and index < len(free) and starts[index] < until:
                taken = min(seconds, left[index])
                left[index] -= taken
                seconds -= taken
                total[free[index][2]] -= taken
                total["save_stall"] += taken
                index += 1
        # Differences of large numbers may be negative after rounding.
        return {kind: max(0.0, length) for kind, length in total.items()}

    def _pieces(self) -> Iterator[tuple[float, float, str]]:
        """Yield (start, end, kind): the whole time, without gaps and overlaps."""
        claims = [1] + [0] * (len(KINDS) - 1)
        at = self._first
        for moment, kind, change in sorted(self._changes):
            if moment > at:
                yield at, moment, _strongest(claims)
                at = moment
            claims[kind] += change
        if at < self._last:
            yield at, self._last, _strongest(claims)


def _strongest(claims: list[int]) -> str:
    return KINDS[max(kind for kind, count in enumerate(claims) if count)]


def _job_steps_at(job: Row, later: Sequence[Row], now: float | None) -> float:
    """Return when the ranks of a job started, or were recorded as not started; `now` if they still may start."""
    for event in later:
        if event.get("job") == job.get("job") and event["time"] >= job["time"]:
            if event["event"] == "start":
                return float(event.get("began_at", event["time"]))
            if event["event"] in ("crash", "left"):
                return float(event["time"])
    newest = all(event["event"] != "job" for event in later[1:])
    return now if newest and now is not None else float(job["time"])


def _lay_out(timeline: Timeline, attempt: Attempt, following: Attempt | None) -> None:
    timeline.claim("restart", attempt.began_at, min(attempt.first_step_at, attempt.ended_at))
    for event in attempt.events:
        if event["event"] == "ready":
            warmed_up_at = event["time"] - event.get("load_s", 0.0)
            timeline.claim("compile", warmed_up_at - event.get("warm_up_s", 0.0), warmed_up_at)
    timeline.claim("other", attempt.first_step_at, attempt.ended_at)
    kept_until = attempt.first_step_at
    kept_step = attempt.kept_step
    for row in attempt.rows:
        if row["step"] > kept_step:
            continue
        row_at, elapsed_s = float(row["time"]), evaluation_s(row)
        timeline.claim("productive", step_began_at(row), row_at)
        # If an attempt is stopped during an evaluation, the next one does it before its first step.
        if row_at + elapsed_s <= attempt.ended_at or following is None:
            timeline.claim("evaluation", row_at, min(row_at + elapsed_s, attempt.ended_at))
        else:
            timeline.claim("evaluation", following.first_step_at, following.first_step_at + elapsed_s)
        kept_until = max(kept_until, row_at + elapsed_s)
    for event in attempt.events:
        if event["event"] == "rollback":
            timeline.claim("lost", event.get("since", event["time"]), event["time"])
    if attempt.died or attempt.lost_steps:
        timeline.claim("lost", kept_until, attempt.ended_at)


def _stalls(attempt: Attempt) -> Iterator[tuple[float, float, float]]:
    """Yield (earliest start, latest end, seconds) of each time that training waited for a checkpoint."""
    steps = [row["step"] for row in attempt.rows]
    for event in attempt.events:
        if event["event"] in ("save", "save_stall", "save_failed"):
            # An older version saved synchronously: then the whole save was a stall.
            stall_s = float(event.get("stall_s", event.get("seconds", 0.0)))
            start = float(event["time"]) - stall_s
            index = bisect_left(steps, event.get("step", -1))
            if index < len(steps) and steps[index] == event.get("step"):
                start = float(attempt.rows[index]["time"])
            elif 0 < index < len(steps):  # within a condensed row: the time between steps is at its beginning
                start = float(attempt.rows[index - 1]["time"])
            yield start, attempt.ended_at, stall_s
