"""The rows of a metrics.jsonl, condensed to what attempts and goodput are computed from.

A run of a million steps has a million rows. Attempts and goodput (hpcgpt.run.attempts, hpcgpt.run.goodput) need where
evaluations, saves and attempts begin and end, and the sum of what is between them. So consecutive steps of an attempt
become one row::

    step, time, attempt    of the last of them
    train/step_s           of all of them together, without overlaps

A row stays alone if it is the first of its attempt, has an evaluation or follows one. A condensed row ends at a step
that an event names, such as a save or a start: there other kinds of time begin and end. The time between steps moves
to the beginning of a condensed row; goodput, which sums up, has the same figures, except that a wait for a save may
be taken from other or from lost time.

Of a long run the blocks of hpcgpt.run.blocks are read instead of the rows. They end at other steps than those of
events: only at those of the EXACT newest events they are divided.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hpcgpt.run import blocks
from hpcgpt.run.blocks import Blocks
from hpcgpt.run.records import Record

EXACT = 100
_STEPS = ("step", "spiked_step", "from_step")  # fields of events


class Timing:
    """Condenses the blocks that `add` gets, in their order. `borders`: the steps of events at which blocks must end."""

    def __init__(self, events: Sequence[Record]) -> None:
        """Condense the rows of a run with these events."""
        self._steps = _steps(events)
        self.borders = _steps(events[-EXACT:])
        self.rows: list[Record] = []
        self._before: np.void | None = None  # the newest block

    def add(self, found: Blocks) -> None:
        """Take the blocks that follow."""
        if len(found):
            self.rows += _as_rows(blocks.joined(found, self._before, self._steps))
            self._before = found[-1]


def timing(folder: Path, events: Sequence[Record]) -> list[Record]:
    """Read the condensed rows of a run folder with these events."""
    found = Timing(events)
    for part in blocks.parts(folder, found.borders):
        found.add(part)
    return found.rows


def _steps(events: Iterable[Record]) -> blocks.Integers:
    return np.array(sorted({event[key] for event in events for key in _STEPS if key in event}), dtype=np.int64)


def _as_rows(found: Blocks) -> list[Record]:
    """Return blocks as rows of metrics.jsonl, with the fields `attempts.TIMING`."""
    made: list[Record] = []
    names = ("last", "time", "attempt", "step_s", "val_s")
    for step, time, attempt, step_s, val_s in zip(*(found[name].tolist() for name in names), strict=True):
        row = {"step": step, "time": time}
        if attempt >= 0:
            row["attempt"] = attempt
        if step_s == step_s:  # not NaN
            row["train/step_s"] = step_s
        if val_s == val_s:
            row["val/elapsed_s"] = val_s
        made.append(row)
    return made
