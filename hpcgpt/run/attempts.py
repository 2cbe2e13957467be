"""The attempts of a run, one after the other, computed from events.jsonl and metrics.jsonl.

An attempt is one start of the ranks: it acquires the lease with a new number, loads a checkpoint, trains, and ends. Its
end is recorded by itself (``end``), or by the batch script (``crash``); after a SIGKILL or the loss of a node neither
may exist, and then its newest record is taken as its end. Attempts never overlap here: if the ranks of one survived the
start of the next (orphans), it counts as ended when the next one began.

Damaged lines and fields are left out (hpcgpt.run.records), and what an older version did not record is estimated. No
torch in here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcgpt import exit_codes
from hpcgpt.run import records
from hpcgpt.run.records import Record as Row


@dataclass(frozen=True)
class Attempt:
    """One attempt. Times are in unix seconds.

    `began_at` is the start of its process, `first_step_at` that of its first step, `ended_at` its end, or now if it is
    running. It resumed at `from_step` and reached `to_step`. `lost_steps` of these are not in the result: a later
    attempt repeated them, or, of the last attempt, they are beyond the newest checkpoint. `rows` are its rows in
    metrics.jsonl, `events` its events. `end` and `crash` are {} if there is no such event.
    """

    number: int
    job: str
    hosts: tuple[str, ...]
    world_size: int
    began_at: float
    first_step_at: float
    ended_at: float
    from_step: int
    to_step: int
    lost_steps: int
    running: bool
    rows: tuple[Row, ...]
    events: tuple[Row, ...]
    end: Row
    crash: Row

    @property
    def kept_step(self) -> int:
        """Return the last of its steps that is part of the result."""
        return self.to_step - self.lost_steps

    @property
    def rolled_back_steps(self) -> int:
        """Count the steps that it repeated after loss spikes; they are not among `lost_steps`."""
        return sum(event.get("lost_steps", 0) for event in self.events if event["event"] == "rollback")

    @property
    def died(self) -> bool:
        """Has it ended without saving?"""
        return not self.running and self.end.get("status") not in (exit_codes.FINISHED, exit_codes.AGAIN)

    @property
    def reason(self) -> str:
        """Return why it ended, as recorded by itself or by the batch script; '' if neither did."""
        return str(self.end.get("reason") or self.crash.get("reason") or "")


# The fields of rows that attempts and goodput are computed from.
TIMING = ("step", "time", "attempt", "train/step_s", "val/elapsed_s")


def read(folder: Path, keys: Collection[str] | None = None) -> tuple[list[Row], list[Row]]:
    """Read the events and rows of a run folder, without damaged ones; with `keys` only these fields of the rows."""
    return records.events(folder), records.rows(folder, keys)


def attempts(events: Sequence[Row], rows: Sequence[Row], now: float | None = None) -> list[Attempt]:
    """Return all attempts, the oldest first. `now` in unix seconds if the newest one is still running, else None."""
    found = starts(events, rows)
    events_of, rows_of = _by_attempt(events), _by_attempt(rows)
    crashes = defaultdict(list)
    for event in events:
        if event["event"] == "crash" and event.get("job"):
            crashes[event["job"]].append(event)
    # Up to which step each counts: where the lowest later attempt began; of the newest, where the next would begin.
    kept = [newest_checkpoint(events) or 0]
    for start in reversed(found[1:]):
        step = int(start.get("step", 0))
        kept.append(step if len(kept) == 1 else min(step, kept[-1]))
    kept.reverse()
    return [
        _attempt(
            start, found[index + 1 : index + 2], events_of[start["attempt"]], rows_of[start["attempt"]],
            crashes.get(str(start.get("job", "")), ()), kept[index],
            None if index + 1 < len(found) else now,
        )
        for index, start in enumerate(found)
    ]  # fmt: skip


def starts(events: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the ``start`` events in order. An attempt that has only rows, as on a full disk, gets one made up."""
    found = {event["attempt"]: event for event in events if event["event"] == "start" and "attempt" in event}
    for row in rows:
        attempt = row.get("attempt")
        if attempt is not None and attempt not in found:
            step = max(0, row["step"] - 1)
            found[attempt] = {"event": "start", "attempt": attempt, "time": step_began_at(row), "step": step}
    return [found[number] for number in sorted(found)]


def newest_checkpoint(events: Iterable[Row]) -> int | None:
    """Return the step of the newest checkpoint that a start would use, as the events show it; None if there is none.

    A start records where it resumed, and a rollback or ``checkpoint.step`` where the run went back to: newer ones were
    damaged, removed or set aside.
    """
    newest: int | None = None
    for event in events:
        step = event.get("step")
        if step is None:
            continue
        if event["event"] == "save":
            newest = max(step, newest or 0)
        elif event["event"] in ("start", "rollback", "went_back"):
            newest = step or None
    return newest


def went_back_to(events: Sequence[Row]) -> int | None:
    """Return the step to which the run went back and from which no attempt has continued yet; None if there is none."""
    for event in reversed(events):
        if event["event"] == "went_back" and "step" in event:
            return int(event["step"])
        if event["event"] == "start":
            return None
    return None


def step_began_at(row: Row) -> float:
    return float(row["time"]) - float(row.get("train/step_s", 0.0))


def evaluation_s(row: Row) -> float:
    return float(row.get("val/elapsed_s", 0.0))


def _by_attempt(found: Iterable[Row]) -> dict[int, list[Row]]:
    by_attempt: dict[int, list[Row]] = defaultdict(list)
    for record in found:
        if "attempt" in record:
            by_attempt[record["attempt"]].append(record)
    return by_attempt


def _attempt(
    start: Row, later: Sequence[Row], events: Sequence[Row], rows: Sequence[Row], crashes: Sequence[Row], kept: int,
    now: float | None,
) -> Attempt:  # fmt: skip
    job = str(start.get("job", ""))
    began_at = _began_at(start)
    until = _began_at(later[0]) if later else float("inf")
    end = _newest(event for event in events if event["event"] == "end")
    # A job that torchrun restarts has several attempts: the crash belongs to the last of them.
    crash = _newest(event for event in crashes if began_at <= event["time"] < until)
    ready = _newest(event for event in events if event["event"] == "ready")
    first_step_at = float((ready or start)["time"])
    if not ready and rows:
        first_step_at = max(began_at, step_began_at(rows[0]))
    kept_until = kept if later else None
    from_step = int(start.get("step", 0))
    steps = [int(event["step"]) for event in [*events, *rows] if "step" in event]
    if later:
        steps.append(int(later[0].get("step", 0)) + int(later[0].get("lost_steps", 0)))
    to_step = max([from_step, *steps])
    if kept_until is None and now is None and end.get("status") not in (exit_codes.FINISHED, exit_codes.AGAIN):
        kept_until = kept
    return Attempt(
        number=start["attempt"],
        job=job,
        hosts=tuple(dict.fromkeys(start.get("hosts") or [start.get("host", "")])),
        world_size=int(start.get("world_size", 0)),
        began_at=began_at,
        first_step_at=min(first_step_at, until),
        ended_at=now if now is not None else _ended_at(end, crash, events, rows, first_step_at, later, until),
        from_step=from_step,
        to_step=to_step,
        lost_steps=max(0, to_step - max(from_step, kept_until)) if kept_until is not None else 0,
        running=now is not None,
        rows=tuple(rows),
        events=tuple(events),
        end=end,
        crash=crash,
    )


def _began_at(start: Row) -> float:
    return min(float(start.get("began_at", start["time"])), float(start["time"]))


def _ended_at(
    end: Row,
    crash: Row,
    events: Sequence[Row],
    rows: Sequence[Row],
    first_step_at: float,
    later: Sequence[Row],
    until: float,
) -> float:
    """Return the time of `end`, else of the newest record, which the next attempt may have cut off metrics.jsonl."""
    if end:
        return min(float(end["time"]), until)
    times = [first_step_at, *(float(event["time"]) for event in events)]
    times += [float(row["time"]) + evaluation_s(row) for row in rows]
    if crash:
        times.append(float(crash["time"]))
    if later:
        last_kept_at = max((float(row["time"]) for row in rows), default=first_step_at)
        times.append(last_kept_at + float(later[0].get("lost_s", 0.0)))
        times.append(float(later[0].get("lost_until", 0.0)))
    return min(max(times), until)


def _newest(events: Iterable[Row]) -> Row:
    found = list(events)
    return found[-1] if found else {}
