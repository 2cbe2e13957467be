"""Which rows of a run the dashboard lacks: the rows of the run folder, less those that have arrived.

Rows are identified by their steps. A requeued run repeats a step with the same metrics, so one row of a step is enough.
A rollback (an event with the step that the run has gone back to) invalidates the rows of later steps: of these, only
rows made after the rollback count as arrived.

No torch in here, and no wandb.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

READ_AHEAD = 1000  # rows


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

    def has(self, step: int, since: float) -> bool:
        """Has a row of this step arrived that was made after `since`?"""
        return step < len(self._times) and self._times[step] > since


class RunRows:
    """The rows and samples of a run folder, and which of them have arrived."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.samples = ArrivedSteps(), ArrivedSteps()
        self._events = JsonlTail(folder / "events.jsonl")
        self._files = (
            (JsonlTail(folder / "metrics.jsonl"), self.rows),
            (JsonlTail(folder / "samples.jsonl"), self.samples),
        )
        self._rollbacks: list[tuple[int, float]] = []

    def lacking(self) -> Iterator[dict[str, Any]]:
        """Yield the rows and samples added since the last call that have not arrived; each then counts as arrived.

        Samples are those with a `text`.
        """
        for tail, arrived in self._files:
            found = tail.read()
            while rows := list(islice(found, READ_AHEAD)):
                # Read after the rows: a rollback's event is written before the rows that repeat its steps.
                self._read_rollbacks()
                for row in rows:
                    if _is_row(row) and not arrived.has(row["step"], self._invalid_until(row["step"], row["time"])):
                        arrived.add(row["step"], row["time"])
                        yield row

    def _read_rollbacks(self) -> None:
        for event in self._events.read():
            if event.get("event") == "rollback" and _is_row(event):
                self._rollbacks.append((event["step"], event["time"]))

    def _invalid_until(self, step: int, made_at: float) -> float:
        """Return the time of the last rollback over this step before `made_at`, which invalidated older rows of it.

        0 if there is none.
        """
        return max((at for back_to, at in self._rollbacks if back_to < step and at <= made_at), default=0.0)


def _is_row(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and row["step"] >= 0 and isinstance(row.get("time"), int | float)
