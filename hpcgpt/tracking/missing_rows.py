"""Which rows of a run a dashboard lacks: what the run folder has, less what has arrived.

A row is its step. A requeued run makes the same step again with the same figures, so that one row of a step is enough.
A rollback (an event with the step that the run has gone back to) makes rows of the steps beyond it void: what has
arrived of them was made before, and the new ones are lacking until they have arrived, too.

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


class Lines:
    """The JSON objects of a .jsonl file that grows, as they come; all of them again if it was replaced or cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] | None = None
        self._end, self._last = 0, b""

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects since the last call; a line that is damaged or not complete is left out."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            start = self._end - len(self._last)
            file.seek(start)
            # It may also have been cut in its place, and have grown again.
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


class Arrived:
    """When the newest row of each step was made that has arrived, in unix seconds; 8 bytes a step."""

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
    """The rows and samples of a run folder, and which of them have not been sent."""

    def __init__(self, folder: Path) -> None:
        self.rows, self.samples = Arrived(), Arrived()
        self._events = Lines(folder / "events.jsonl")
        self._files = ((Lines(folder / "metrics.jsonl"), self.rows), (Lines(folder / "samples.jsonl"), self.samples))
        self._rollbacks: list[tuple[int, float]] = []

    def lacking(self) -> Iterator[dict[str, Any]]:
        """Rows and samples that have come since the last call and have not arrived; each counts as sent then.

        Samples are the ones with a `text`.
        """
        for lines, arrived in self._files:
            found = lines.read()
            while rows := list(islice(found, READ_AHEAD)):
                # After the rows: what is computed again after a rollback is written after its event.
                self._read_rollbacks()
                for row in rows:
                    if _is_row(row) and not arrived.has(row["step"], self._void_until(row["step"], row["time"])):
                        arrived.add(row["step"], row["time"])
                        yield row

    def _read_rollbacks(self) -> None:
        for event in self._events.read():
            if event.get("event") == "rollback" and _is_row(event):
                self._rollbacks.append((event["step"], event["time"]))

    def _void_until(self, step: int, made_at: float) -> float:
        """When the run last went back over this step before `made_at`: rows of the step from before that are void.
        0 if it has not."""
        return max((at for back_to, at in self._rollbacks if back_to < step and at <= made_at), default=0.0)


def _is_row(row: dict[str, Any]) -> bool:
    return isinstance(row.get("step"), int) and row["step"] >= 0 and isinstance(row.get("time"), int | float)
