"""The pace of a run, from its records: how long its steps, evaluations, saves and starts take.

Steady steps are those after the first ones of an attempt, without an evaluation before them and without a save beside
them. A step is timed from its end to the end of the next one, so that all that happens between steps counts.

No torch in here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
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

    def began_at(self) -> float:
        return float(self.before["time"])

    @property
    def seconds(self) -> float:
        return float(self.after["time"]) - float(self.before["time"])


class _Saves:
    """When a run saved. A run has up to a million gaps and thousands of saves, so they are found by bisection."""

    def __init__(self, saves: Sequence[Record]) -> None:
        spans = sorted((float(save["time"]) - float(save["seconds"]), float(save["time"])) for save in saves)
        self._starts = [start for start, _ in spans]
        self._latest_ends = list(accumulate((end for _, end in spans), max))

    def overlap(self, gap: _Gap) -> bool:
        begun = bisect_left(self._starts, float(gap.after["time"]))
        return begun > 0 and self._latest_ends[begun - 1] > float(gap.before["time"])


def read(folder: Path) -> Pace:
    """Return the pace of the run in `folder`, which need not exist."""
    rows = records.rows(folder, _KEYS)
    events = records.events(folder) if folder.is_dir() else []
    saves = [event for event in events if event["event"] == "save" and event.get("seconds")]
    save_s = median(event["seconds"] for event in saves) if saves else None
    gaps, during = list(_gaps(rows)), _Saves(saves)
    steady = [
        gap for gap in gaps
        if not gap.is_warm_up and not evaluation_s(gap.before) and not during.overlap(gap)
    ][-RECENT_STEPS:]  # fmt: skip
    if len(steady) < FEWEST_STEPS:
        return Pace(len(steady), save_s=save_s, start_s=_start_s(events, rows, None))
    step_s = median(gap.seconds for gap in steady)
    tokens = steady[-1].after.get("tokens", 0) / steady[-1].after["step"] if steady[-1].after["step"] else 0
    return Pace(
        len(steady), step_s, tokens / step_s if tokens and step_s > 0 else None, _eval_s(rows, gaps, during, step_s),
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


def _eval_s(rows: Sequence[Record], gaps: Sequence[_Gap], during: _Saves, step_s: float) -> float | None:
    """Return how long an evaluation takes. The first one of an attempt may compile, so others are preferred."""
    evaluated = [row for row in rows if evaluation_s(row)]
    by_attempt: dict[object, Record] = {}
    for row in evaluated:
        by_attempt.setdefault(row.get("attempt"), row)
    first = {id(row) for row in by_attempt.values()}
    whole = [
        max(evaluation_s(gap.before), gap.seconds - step_s) for gap in gaps
        if evaluation_s(gap.before) and id(gap.before) not in first and not during.overlap(gap)
    ]  # fmt: skip
    later = [evaluation_s(row) for row in evaluated if id(row) not in first]
    found = whole or later or [evaluation_s(row) for row in evaluated]
    return median(found) if found else None


def _stall_s(events: Sequence[Record], gaps: Sequence[_Gap], saves: Sequence[Record], step_s: float) -> float | None:
    """Return what a save costs training: what it waits, and how much slower steps are beside it."""
    found = []
    in_order = sorted(gaps, key=_Gap.began_at)
    begins = [gap.began_at() for gap in in_order]
    ends = list(accumulate((float(gap.after["time"]) for gap in in_order), max))
    stalls: dict[object, list[Record]] = {}
    for event in events:
        if event["event"] == "save_stall":
            stalls.setdefault(event.get("step"), []).append(event)
    for save in saves:
        ended_at = float(save["time"])
        begun_at = ended_at - float(save["seconds"])
        near = in_order[bisect_right(ends, begun_at) : bisect_left(begins, ended_at)]
        beside = [gap for gap in near if float(gap.after["time"]) > begun_at]
        if not beside:
            continue  # the last save, after the last step
        waited_s = sum(event.get("stall_s", 0.0) for event in [save, *stalls.get(save.get("step"), [])])
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
