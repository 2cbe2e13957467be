"""The attempts at a run, one after the other, as events.jsonl and metrics.jsonl tell of them.

An attempt is one start of the ranks: it takes a generation number, loads a checkpoint, steps, and ends. How it ended
is told by itself (``end``), else by the batch script (``crash``), else by nobody: after a SIGKILL or the loss of a node
the last sign of life has to do. Two attempts never overlap here: if the ranks of one survived into the time of the
next (an orphan), it counts as over when the next one began.

Nothing here expects a file to be whole: lines and fields that are damaged are left out (hpcgpt.run.records), and what
an older version did not record is taken from what it did. No torch in here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcgpt import exit_codes
from hpcgpt.run import records
from hpcgpt.run.records import Record as Row


@dataclass(frozen=True)
class Attempt:
    """One attempt. Times are in unix seconds.

    It began when its process began, `first_step_at` it was ready to step, `ended_at` it was over, or now if it runs.
    It resumed at `from_step` and came as far as `to_step`, of which `lost_steps` were done in vain: thrown away by a
    later attempt, or beyond the newest checkpoint if it is the last. `rows` are those of its steps that
    are in metrics.jsonl, `events` its own. `end` and `crash` are {} where there was none.
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
        """The last of its steps that is part of the result."""
        return self.to_step - self.lost_steps

    @property
    def rolled_back_steps(self) -> int:
        """Steps that a loss spike made it do again; they are not among the lost ones."""
        return sum(event.get("lost_steps", 0) for event in self.events if event["event"] == "rollback")

    @property
    def died(self) -> bool:
        """It is over, and did not save before it left."""
        return not self.running and self.end.get("status") not in (exit_codes.FINISHED, exit_codes.AGAIN)

    @property
    def reason(self) -> str:
        """Why it ended, in its own words or in those of the batch script; '' if neither did."""
        return str(self.end.get("reason") or self.crash.get("reason") or "")


def read(folder: Path) -> tuple[list[Row], list[Row]]:
    """Events and rows of a run folder, without what is damaged."""
    return records.events(folder), records.rows(folder)


def attempts(events: Sequence[Row], rows: Sequence[Row], now: float | None = None) -> list[Attempt]:
    """All attempts, the oldest first. `now`: the newest one is still running; None: it is not."""
    found = starts(events, rows)
    own, mine = _by_attempt(events), _by_attempt(rows)
    crashes = [event for event in events if event["event"] == "crash"]
    # What the next attempt will resume at if there was none after the newest one.
    saved = max((event.get("step", 0) for event in events if event["event"] == "save"), default=0)
    return [
        _attempt(
            start, found[index + 1 :], own[start["attempt"]], mine[start["attempt"]], crashes, saved,
            None if index + 1 < len(found) else now,
        )
        for index, start in enumerate(found)
    ]  # fmt: skip


def starts(events: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The ``start`` events in order, one made up for each attempt that has rows only: its disk was full."""
    found = {event["attempt"]: event for event in events if event["event"] == "start" and "attempt" in event}
    for row in rows:
        attempt = row.get("attempt")
        if attempt is not None and attempt not in found:
            step = max(0, row["step"] - 1)
            found[attempt] = {"event": "start", "attempt": attempt, "time": step_began_at(row), "step": step}
    return [found[number] for number in sorted(found)]


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
    start: Row, later: Sequence[Row], own: Sequence[Row], mine: Sequence[Row], crashes: Sequence[Row], saved: int,
    now: float | None,
) -> Attempt:  # fmt: skip
    job = str(start.get("job", ""))
    began_at = _began_at(start)
    until = _began_at(later[0]) if later else float("inf")
    end = _newest(event for event in own if event["event"] == "end")
    # A job that torchrun restarts has several attempts: the crash is the last one's.
    crash = _newest(
        event for event in crashes if job and event.get("job") == job and began_at <= event["time"] < until
    )  # fmt: skip
    ready = _newest(event for event in own if event["event"] == "ready")
    first_step_at = float((ready or start)["time"])
    if not ready and mine:
        first_step_at = max(began_at, step_began_at(mine[0]))
    kept_until = min((int(event.get("step", 0)) for event in later), default=None)
    from_step = int(start.get("step", 0))
    steps = [int(event["step"]) for event in [*own, *mine] if "step" in event]
    if later:
        steps.append(int(later[0].get("step", 0)) + int(later[0].get("lost_steps", 0)))
    to_step = max([from_step, *steps])
    if kept_until is None and now is None and end.get("status") not in (exit_codes.FINISHED, exit_codes.AGAIN):
        kept_until = saved
    return Attempt(
        number=start["attempt"],
        job=job,
        hosts=tuple(dict.fromkeys(start.get("hosts") or [start.get("host", "")])),
        world_size=int(start.get("world_size", 0)),
        began_at=began_at,
        first_step_at=min(first_step_at, until),
        ended_at=now if now is not None else _ended_at(end, crash, own, mine, first_step_at, later, until),
        from_step=from_step,
        to_step=to_step,
        lost_steps=max(0, to_step - max(from_step, kept_until)) if kept_until is not None else 0,
        running=now is not None,
        rows=tuple(mine),
        events=tuple(own),
        end=end,
        crash=crash,
    )


def _began_at(start: Row) -> float:
    return min(float(start.get("began_at", start["time"])), float(start["time"]))


def _ended_at(
    end: Row,
    crash: Row,
    own: Sequence[Row],
    mine: Sequence[Row],
    first_step_at: float,
    later: Sequence[Row],
    until: float,
) -> float:
    """Its own last word, else the newest sign of life, which the next attempt may have cut off metrics.jsonl."""
    if end:
        return min(float(end["time"]), until)
    signs = [first_step_at, *(float(event["time"]) for event in own)]
    signs += [float(row["time"]) + evaluation_s(row) for row in mine]
    if crash:
        signs.append(float(crash["time"]))
    if later:
        last_kept_at = max((float(row["time"]) for row in mine), default=first_step_at)
        signs.append(last_kept_at + float(later[0].get("lost_s", 0.0)))
        signs.append(float(later[0].get("lost_until", 0.0)))
    return min(max(signs), until)


def _newest(events: Iterable[Row]) -> Row:
    found = list(events)
    return found[-1] if found else {}
