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

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hpcgpt.run import attempts, records
from hpcgpt.run.records import Record

_STEPS = ("step", "spiked_step", "from_step")  # fields of events


class Timing:
    """Condenses the rows that `add` gets, in their order."""

    def __init__(self, events: Iterable[Record]) -> None:
        """Condense the rows of a run with these events."""
        self._borders = {event[key] for event in events for key in _STEPS if key in event}
        self._done: list[Record] = []
        self._open: dict[str, Any] = {}  # the newest condensed row
        self._may_be_joined = False
        self._before: Record = {}  # the newest row

    @property
    def rows(self) -> list[Record]:
        """Return the rows so far."""
        return [*self._done, self._open] if self._open else self._done

    def add(self, rows: Iterable[Record]) -> None:
        """Take the rows that follow, with the fields `attempts.TIMING`."""
        for row in rows:
            before, self._before = self._before, row
            same = bool(before) and row.get("attempt") == before.get("attempt")
            if same and "train/step_s" in row:
                # Clocks differ by milliseconds: without what the step before took already.
                row = {**row, "train/step_s": min(row["train/step_s"], max(0.0, row["time"] - before["time"]))}
            if self._may_be_joined and same and self._joins(row, before):
                self._open["train/step_s"] = self._open.get("train/step_s", 0.0) + row.get("train/step_s", 0.0)
                self._open["time"], self._open["step"] = row["time"], row["step"]
                continue
            if self._open:
                self._done.append(self._open)
            self._open = dict(row)
            self._may_be_joined = same and not ("val/elapsed_s" in row or "val/elapsed_s" in before)

    def _joins(self, row: Record, before: Record) -> bool:
        """Does a row continue the condensed row that ends with the row `before` of the same attempt?"""
        return "val/elapsed_s" not in row and before["step"] not in self._borders and row["time"] > before["time"]


def timing(folder: Path, events: Sequence[Record]) -> list[Record]:
    """Read the condensed rows of a run folder with these events."""
    found = Timing(events)
    for rows in records.blocks(folder, attempts.TIMING):
        found.add(rows)
    return found.rows
