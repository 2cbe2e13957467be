"""Goodput: what the time of a run went into, over all of its attempts and jobs.

Every moment between the first event and the last one (or now, while the run is going) belongs to exactly one kind of
time, so the kinds add up to the whole:

    productive   steps that are part of the result
    evaluation   validation
    lost         steps that were thrown away because an attempt died after its last checkpoint, what else it did
                 since, and the time until its death was noticed; or because a loss spike sent the run back
    save_stall   training stood still for a checkpoint
    restart      from the start of a job or a process to its first step: imports, rendezvous, loading
    compile      the warm-up pass and compilation
    queue        before the first start, and between the end of an attempt and the next start: waiting for Slurm, or
                 for somebody to start it again
    other        the rest of an attempt: logging, samples, leaving

Goodput is productive / all. It is computed by laying everything that is known on one timeline: where two things claim
the same moment the more certain one has it, and a moment that nothing claims is other within an attempt, queue outside.
Only save stalls have a length and no exact place: they take what is unclaimed after their step. Runs of older versions
tell less: what they leave out shows as queue or other, never twice.

No torch in here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hpcgpt import history
from hpcgpt.history import Attempt, Row, evaluation_s, step_began_at

# Of two claims to one moment the later in this list has it. Nobody claims queue: it is what is left.
KINDS = ("queue", "restart", "compile", "other", "lost", "evaluation", "productive")
SHOWN = {
    "productive_s": "productive",
    "evaluation_s": "evaluation",
    "lost_s": "lost after the last checkpoint",
    "save_stall_s": "standing still for saves",
    "restart_s": "start-up until the first step",
    "compile_s": "warm-up and compile",
    "queue_s": "queue: waiting to be started",
    "other_s": "other",
}


@dataclass(frozen=True)
class Goodput:
    """Seconds by kind; `lost_steps` were done in vain, in `attempts` so far."""

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

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """A fraction; None while there is no time to divide by."""
        return self.productive_s / self.total_s if self.total_s > 0 else None

    @property
    def seconds(self) -> dict[str, float]:
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name in SHOWN}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "goodput": self.goodput,
            "total_s": self.total_s,
            **self.seconds,
            "lost_steps": self.lost_steps,
            "attempts": self.attempts,
        }

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Goodput:
        """What `as_dict` gave."""
        return cls(**{item.name: figures[item.name] for item in fields(cls)})

    def line(self) -> str:
        """The same in one line: what costs most comes first, what costs less than 0.1 % is left out."""
        costs = {
            SHOWN[name]: seconds / self.total_s for name, seconds in self.seconds.items() if name != "productive_s"
        }
        told = [f"{label} {share:.1%}" for label, share in sorted(costs.items(), key=lambda c: -c[1]) if share >= 0.001]
        return f"goodput {self.goodput or 0:.1%}: " + (", ".join(told) or "nothing else")

    def words(self) -> str:
        """A small table for people."""
        if self.goodput is None:
            return "goodput: nothing has been trained yet"
        total = self.total_s
        lost = f", {self.lost_steps:,} steps done in vain" if self.lost_steps else ""
        lines = [f"goodput {self.goodput:.1%} over {self.attempts} attempt{'s' * (self.attempts != 1)}{lost}"]
        width = max(len(f"{total:,.1f}"), 8)
        for name, label in SHOWN.items():
            seconds = self.seconds[name]
            lines.append(f"  {label:32}{seconds:{width},.1f} s  {seconds / total:6.1%}")
        lines.append(f"  {'total':32}{total:{width},.1f} s")
        return "\n".join(lines)


def words(folder: Path) -> str:
    """The table of a run whose newest attempt is over."""
    return measure(*history.read(folder)).words()


def measure(events: Sequence[Row], rows: Sequence[Row], now: float | None = None) -> Goodput:
    """Of the events and rows of a run; `now` in unix seconds while it is going, else None."""
    attempts = history.attempts(events, rows, now)
    moments = [now] if now is not None else []
    for event in events:
        moments += [float(event[key]) for key in ("time", "began_at", "queued_at") if event.get(key)]
    for attempt in attempts:
        moments += [attempt.began_at, attempt.ended_at]
    for row in rows:
        moments += [step_began_at(row), float(row["time"])]
    timeline = Timeline(min(moments, default=0.0), max(moments, default=0.0))
    for event in events:
        if event["event"] == "job":
            timeline.claim("restart", float(event.get("started_at", event["time"])), _job_steps_at(event, events))
    for index, attempt in enumerate(attempts):
        following = attempts[index + 1] if index + 1 < len(attempts) else None
        _lay_out(timeline, attempt, following)
    seconds = timeline.seconds(stall for attempt in attempts for stall in _stalls(attempt))
    return Goodput(
        **{f"{kind}_s": length for kind, length in seconds.items()},
        lost_steps=sum(attempt.lost_steps + attempt.rolled_back_steps for attempt in attempts),
        attempts=len(attempts),
    )


class Timeline:
    """Claims to the time between two moments."""

    def __init__(self, first: float, last: float) -> None:
        self._first, self._last = first, last
        self._changes: list[tuple[float, int, int]] = []

    def claim(self, kind: str, start: float, end: float) -> None:
        start, end = max(start, self._first), min(end, self._last)
        if start < end:
            self._changes += [(start, KINDS.index(kind), 1), (end, KINDS.index(kind), -1)]

    def seconds(self, stalls: Iterable[tuple[float, float, float]]) -> dict[str, float]:
        """Seconds by kind. A stall (start, until, seconds) takes unclaimed time of an attempt between the two."""
        pieces = list(self._pieces())
        starts = [start for start, _, _ in pieces]
        free = [end - start if kind in ("other", "lost") else 0.0 for start, end, kind in pieces]
        total = dict.fromkeys([*KINDS, "save_stall"], 0.0)
        for start, end, kind in pieces:
            total[kind] += end - start
        for start, until, seconds in stalls:
            index = max(0, bisect_right(starts, start) - 1)
            while seconds > 0 and index < len(pieces) and starts[index] < until:
                taken = min(seconds, free[index])
                free[index] -= taken
                seconds -= taken
                total[pieces[index][2]] -= taken
                total["save_stall"] += taken
                index += 1
        # Differences of large numbers: rounding may leave less than nothing.
        return {kind: max(0.0, length) for kind, length in total.items()}

    def _pieces(self) -> Iterator[tuple[float, float, str]]:
        """(start, end, kind): the whole time, without a gap and without an overlap."""
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


def _job_steps_at(job: Row, events: Sequence[Row]) -> float:
    """When the ranks of a job began, or the batch script said that they never did."""
    for event in events:
        if event.get("job") == job.get("job") and event["time"] >= job["time"]:
            if event["event"] == "start":
                return float(event.get("began_at", event["time"]))
            if event["event"] == "crash":
                return float(event["time"])
    return float(job["time"])


def _lay_out(timeline: Timeline, attempt: Attempt, following: Attempt | None) -> None:
    timeline.claim("restart", attempt.began_at, min(attempt.first_step_at, attempt.ended_at))
    for event in attempt.events:
        if event["event"] == "ready":
            warmed_up_at = float(event["time"]) - float(event.get("load_s", 0.0))
            timeline.claim("compile", warmed_up_at - float(event.get("warm_up_s", 0.0)), warmed_up_at)
    timeline.claim("other", attempt.first_step_at, attempt.ended_at)
    kept_until = attempt.first_step_at
    for row in attempt.rows:
        if row["step"] > attempt.kept_step:
            continue
        row_at, elapsed_s = float(row["time"]), evaluation_s(row)
        timeline.claim("productive", step_began_at(row), row_at)
        # An attempt that is stopped within an evaluation leaves it to the next one, which makes it before any step.
        if row_at + elapsed_s <= attempt.ended_at or following is None:
            timeline.claim("evaluation", row_at, min(row_at + elapsed_s, attempt.ended_at))
        else:
            timeline.claim("evaluation", following.first_step_at, following.first_step_at + elapsed_s)
        kept_until = max(kept_until, row_at + elapsed_s)
    for event in attempt.events:
        if event["event"] == "rollback":
            timeline.claim("lost", float(event.get("since", event["time"])), float(event["time"]))
    if attempt.died or attempt.lost_steps:
        timeline.claim("lost", kept_until, attempt.ended_at)


def _stalls(attempt: Attempt) -> Iterator[tuple[float, float, float]]:
    """(earliest start, latest end, seconds) of each time that training stood still for a checkpoint."""
    ends = {row["step"]: float(row["time"]) for row in attempt.rows}
    for event in attempt.events:
        if event["event"] in ("save", "save_stall", "save_failed"):
            # Saving was synchronous once: then all of it was a stall.
            stall_s = float(event.get("stall_s", event.get("seconds", 0.0)))
            yield ends.get(event.get("step"), float(event["time"]) - stall_s), attempt.ended_at, stall_s
