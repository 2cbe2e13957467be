"""Which lines of a run the dashboard lacks: the lines of the run folder, less those that have arrived.

Rows and samples are identified by their steps. A requeued run repeats a step with the same metrics, so one row of a
step is enough. Where the run goes back (a rollback, checkpoint.step, a start with other settings: hpcgpt.run.undone),
the rows of later steps become obsolete: of these, only rows made afterwards count as arrived. Events are identified by
their times, and are never obsolete: a rollback has happened.

No torch in here, and no wandb.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hpcgpt.run import records
from hpcgpt.run.undone import Undone

READ_AHEAD = 1000  # rows
LINES = ("metrics.jsonl", "samples.jsonl", "ranks.jsonl")  # files of lines with a step


class JsonlTail:
    """Follows a growing .jsonl file; if the file was replaced or truncated, it begins again at the first line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._end, self._last = 0, b""

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield the objects added since the last call; damaged and incomplete lines are left out."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            start = self._end - len(self._last)
            file.seek(start)
            # It may also have been truncated in place, and have grown again.
            if (found.st_dev, found.st_ino) != self._file or file.read(len(self._last)) != self._last:
                self._file, self._end, self._last = (found.st_dev, found.st_ino), 0, b""
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._end, self._last = self._end + len(line), line
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row


class ArrivedSteps:
    """The steps whose rows have arrived, each with the unix time at which its newest such row was made (8 bytes)."""

    def __init__(self) -> None:
        self._times = array("d")

    def add(self, step: int, made_at: float) -> None:
        if step >= len(self._times):
            self._times.extend([0.0] * (step + 1024 - len(self._times)))
        self._times[step] = max(self._times[step], made_at)

    def replace(self, step: int, made_at: float) -> None:
        """Note a row that counts instead of the one before, whatever the clock of that one's host was."""
        self.add(step, made_at)
        self._times[step] = made_at

    def has(self, step: int, since: float) -> bool:
        """Has a row of this step arrived that was made after `since`?"""
        return step < len(self._times) and self._times[step] > since

    def after(self, step: int) -> Iterator[tuple[int, float]]:
        """Yield the later steps whose rows have arrived, with their times."""
        for later in range(step + 1, len(self._times)):
            if self._times[later] > 0.0:
                yield later, self._times[later]

    def at(self, step: int) -> float:
        """Return the time of the row of a step; 0 if none has arrived."""
        return self._times[step] if step < len(self._times) else 0.0


class RunRows:
    """The lines of a run folder, and which of them have arrived.

    `has_obsolete`: rows have arrived that the run has gone back from since. `evaluations`: validation loss by step, of
    all rows that have been read, without obsolete ones.
    """

    def __init__(self, folder: Path) -> None:
        self.rows, self.samples, self.ranks = ArrivedSteps(), ArrivedSteps(), ArrivedSteps()
        self.events: set[float] = set()  # the times of those that have arrived
        self.has_obsolete = False
        self.evaluations: dict[int, float] = {}
        self._events = JsonlTail(folder / "events.jsonl")
        self._files = tuple((JsonlTail(folder / name), self.arrived(name)) for name in LINES)
        self._undone = Undone()
        self._new_events: deque[dict[str, Any]] = deque()
        self._step = 0  # of the newest row or event
        self._loss: float | None = None

    def arrived(self, name: str) -> ArrivedSteps:
        """Return which lines of the file of this name have arrived."""
        return {"metrics.jsonl": self.rows, "samples.jsonl": self.samples, "ranks.jsonl": self.ranks}[name]

    def note(self, name: str, step: int, made_at: float) -> None:
        """Note that a line of the file of this name has arrived."""
        if name == "events.jsonl":
            self.events.add(made_at)
        else:
            self.arrived(name).add(step, made_at)

    def has(self, name: str, step: int, made_at: float) -> bool:
        """Has this line, or a newer one of its step, arrived?"""
        return made_at in self.events if name == "events.jsonl" else self.arrived(name).has(step, made_at - 1e-3)

    def lacking(self) -> Iterator[dict[str, Any]]:
        """Yield the lines added since the last call that have not arrived; each then counts as arrived.

        Events have an `event`, samples a `text`, times of the ranks a `local_s`; the others are rows. An event comes
        before the rows that were made after it; one without a step gets that of the row before. `loss_before` is the
        loss of that row.
        """
        for tail, arrived in self._files:
            found = tail.read()
            while rows := list(islice(found, READ_AHEAD)):
                # Read after the rows: a rollback's event is written before the rows that repeat its steps.
                self.read_events()
                for row in rows:
                    if not _is_row(row) or self.is_obsolete(row["step"], row["time"], row.get("attempt")):
                        continue
                    if arrived is self.rows:
                        yield from self._lacking_events(until=row["time"])
                        self._step, self._loss = row["step"], row.get("train/loss", self._loss)
                        if records.is_number(row.get("val/loss")):
                            self.evaluations[row["step"]] = row["val/loss"]
                    made_at = arrived.at(row["step"])
                    if made_at <= 0.0 or self.is_obsolete(row["step"], made_at):
                        arrived.replace(row["step"], row["time"])
                        yield row
        self.read_events()
        yield from self._lacking_events(until=float("inf"))

    def read_events(self) -> None:
        """Read the events added since the last call."""
        for event in self._events.read():
            if not isinstance(event.get("event"), str) or not records.is_time(event.get("time")):
                continue
            self._new_events.append(event)
            if self._undone.add(event):
                self.evaluations = {step: loss for step, loss in self.evaluations.items() if step <= event["step"]}
                arrived = (self.rows, self.samples, self.ranks)
                self.has_obsolete |= any(
                    self._undone.has(step, at, newest=True)
                    for each in arrived
                    for step, at in each.after(event["step"])
                )

    @property
    def goes_back(self) -> bool:
        """Has the run gone back, by the events so far?"""
        return self._undone.has_returns

    def is_obsolete(self, step: int, made_at: float, attempt: Any = None) -> bool:
        """Has the run gone back from this step since a row of it was made, at a time and by an attempt, if known?"""
        return self._undone.has(step, made_at, attempt)

    def _lacking_events(self, until: float) -> Iterator[dict[str, Any]]:
        while self._new_events and self._new_events[0]["time"] <= until:
            event = self._new_events.popleft()
            if _is_row(event):
                self._step = event["step"]
            if event["time"] not in self.events:
                self.events.add(event["time"])
                yield event | {"step": self._step, "loss_before": self._loss}


def _is_row(row: dict[str, Any]) -> bool:
    return records.is_count(row.get("step")) and records.is_time(row.get("time"))
