"""The pace of a run, from its records: how long its steps, evaluations, saves and starts take.

Steady steps are those after the first ones of an attempt, without an evaluation before them and without a save beside
them. A step is timed from its end to the end of the next one, so that all that happens between steps counts.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

from hpcgpt.run import records
from hpcgpt.run.attempts import evaluation_s
from hpcgpt.run.records import Record

FEWEST_STEPS = 3  # for a median
RECENT_STEPS = 200
WARM_UP_STEPS = 2  # of an attempt: they allocate the optimizer's state, and fill caches
_KEYS = ("step", "time", "attempt", "tokens", "train/step_s", "val/elapsed_s")
_START = ("imports_s", "meet_s", "warm_up_s", "load_s")


@dataclass(frozen=True)
class Pace:
    """Medians in seconds; None is what the run has not shown. `steps`: how many steady steps were measured.

    `eval_s`: an evaluation with its sample. `stall_s`: how much longer training takes because of a save in its
    background. `save_s`: a save from its beginning until it is visible, which the end of a start waits for. `start_s`:
    from the start of the processes to steady steps, with compilation.
    """

    steps: int
    step_s: float | None = None
    tokens_per_s: float | None = None
    eval_s: float | None = None
    stall_s: float | None = None
    save_s: float | None = None
    start_s: float | None = None


@dataclass(frozen=True)
class _Gap:
    """The time from the end of step `before` to the end of the next one."""

    before: Record
    after: Record
    is_warm_up: bool

    @property
    def seconds(self) -> float:
        return float(self.after["time"]) - float(self.before["time"])

    def overlaps(self, save: Record) -> bool:
        ended_at = float(save["time"])
        return float(self.before["time"]) < ended_at and ended_at - save["seconds"] < float(self.after["time"])


def read(folder: Path) -> Pace:
    """Return the pace of the run in `folder`, which need not exist."""
    rows = records.rows(folder, _KEYS)
    events = records.events(folder) if folder.is_dir() else []
    saves = [event for event in events if event["event"] == "save" and event.get("seconds")]
    save_s = median(event["seconds"] for event in saves) if saves else None
    gaps = list(_gaps(rows))
    steady = [
        gap for gap in gaps
        if not gap.is_warm_up and not evaluation_s(gap.before) and not any(map(gap.overlaps, saves))
    ][-RECENT_STEPS:]  # fmt: skip
    if len(steady) < FEWEST_STEPS:
        return Pace(len(steady), save_s=save_s, start_s=_start_s(events, rows, None))
    step_s = median(gap.seconds for gap in steady)
    tokens = steady[-1].after.get("tokens", 0) / steady[-1].after["step"] if steady[-1].after["step"] else 0
    return Pace(
        len(steady), step_s, tokens / step_s if tokens and step_s > 0 else None, _eval_s(rows, gaps, saves, step_s),
        _stall_s(events, gaps, saves, step_s), save_s, _start_s(events, rows, step_s),
    )  # fmt: skip


def _gaps(rows: Sequence[Record]) -> Iterator[_Gap]:
    """Yield the gaps between neighbouring steps of the same attempt."""
    made = 0  # steps of this attempt
    for before, after in pairwise(rows):
        if before.get("attempt") != after.get("attempt") or after["step"] != before["step"] + 1:
            made = 0
            continue
        made += 1
        yield _Gap(before, after, made < WARM_UP_STEPS)


def _eval_s(rows: Sequence[Record], gaps: Sequence[_Gap], saves: Sequence[Record], step_s: float) -> float | None:
    """Return how long an evaluation takes. The first one of an attempt may compile, so others are preferred."""
    evaluated = [row for row in rows if evaluation_s(row)]
    attempts = [row.get("attempt") for row in evaluated]
    first = {id(row) for number, row in enumerate(evaluated) if attempts.index(attempts[number]) == number}
    whole = [
        max(evaluation_s(gap.before), gap.seconds - step_s) for gap in gaps
        if evaluation_s(gap.before) and id(gap.before) not in first and not any(map(gap.overlaps, saves))
    ]  # fmt: skip
    later = [evaluation_s(row) for row in evaluated if id(row) not in first]
    found = whole or later or [evaluation_s(row) for row in evaluated]
    return median(found) if found else None


def _stall_s(events: Sequence[Record], gaps: Sequence[_Gap], saves: Sequence[Record], step_s: float) -> float | None:
    """Return what a save costs training: what it waits, and how much slower steps are beside it."""
    found = []
    for save in saves:
        beside = [gap for gap in gaps if gap.overlaps(save)]
        if not beside:
            continue  # the last save, after the last step
        same = [event for event in events if event["event"] == "save_stall" and event.get("step") == save.get("step")]
        waited_s = sum(event.get("stall_s", 0.0) for event in [save, *same])
        if any(evaluation_s(gap.before) for gap in beside):
            found.append(waited_s)
        else:
            found.append(max(waited_s, sum(gap.seconds - step_s for gap in beside)))
    return median(found) if found else None


def _start_s(events: Sequence[Record], rows: Sequence[Record], step_s: float | None) -> float | None:
    """Return how long a start takes until steps are steady."""
    starts = [event for event in events if event["event"] == "ready"]
    if not starts:
        return None
    seconds = float(median(sum(event.get(key, 0.0) for key in _START) for event in starts))
    if step_s is None:
        return seconds
    newest = [row for row in rows if row.get("attempt") == rows[-1].get("attempt")][:WARM_UP_STEPS]
    return seconds + max(0.0, sum(float(row.get("train/step_s", step_s)) - step_s for row in newest))
