"""Where metrics.jsonl is cut off when a run repeats steps: read from its end, whatever its size.

Read are the rows that are cut off, and TAIL_ROWS before them. Rows before those were read by an earlier start, or
written by the attempts since. No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hpcgpt.run import records
from hpcgpt.run.row_search import first_from

TAIL_ROWS = 1000
SPIKE_METRICS = ("train/loss", "train/grad_norm")  # read by hpcgpt.training.spikes


@dataclass
class Lost:
    """The rows of steps that are repeated: their number, seconds, and the unix times of their begin and end."""

    steps: int = 0
    seconds: float = 0.0
    began_at: float | None = None
    until: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; one without times is not counted."""
        if not all(records.is_time(row.get(key)) for key in ("time", "train/step_s")):
            return
        self.steps += 1
        self.seconds += row["train/step_s"]
        if self.began_at is None:
            self.began_at = row["time"] - row["train/step_s"]
        self.until = max(row["time"], self.until or 0.0)


@dataclass
class Cut:
    """A file whose bytes before `start` stay, with `kept` after them instead of what it has there.

    `is_prefix`: the file has `kept` there already, so that truncating it is enough. `tail`: the last rows that stay,
    those with the SPIKE_METRICS. `damaged`: lines that could not be read, if one of the steps `missing` is among them.
    """

    start: int = 0
    kept: bytes = b""
    is_prefix: bool = False
    lost: Lost = field(default_factory=Lost)
    tail: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[bytes] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Return the size of the file that is left."""
        return self.start + len(self.kept)


def find(path: Path, keep_below: int, done: int | None = None) -> Cut:
    """Find where to cut off the rows of step `keep_below` and later.

    Rows after step `done` are lost; None: all that are cut off.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return _find(file, keep_below, keep_below - 1 if done is None else done)
    except FileNotFoundError:
        return Cut()


def _find(file: BinaryIO, keep_below: int, done: int) -> Cut:
    found = Cut(start=first_from(file, keep_below - TAIL_ROWS) if keep_below > TAIL_ROWS else 0)
    lines: dict[int, bytes] = {}
    rows: dict[int, dict[str, Any]] = {}
    damaged = []
    newest = -1  # of the rows that are cut off
    file.seek(found.start)
    for line in file:
        row = records.parsed(line)
        step: Any = row.get("step")
        if not (records.is_count(step) and records.is_time(row.get("time", 0.0))):
            if line.strip(b"\n"):
                damaged.append(line.rstrip(b"\n"))
        elif step < keep_below:
            lines.setdefault(step, line if line.endswith(b"\n") else line + b"\n")
            rows.setdefault(step, row)
        elif step > newest:
            newest = step
            if step > done:
                found.lost.add(row)
    found.kept = b"".join(lines[step] for step in sorted(lines))
    first = max(1, keep_below - TAIL_ROWS)
    if damaged and len(rows) < keep_below - first:
        found.damaged, found.missing = damaged, [step for step in range(first, keep_below) if step not in rows]
    file.seek(found.start)
    found.is_prefix = file.read(len(found.kept)) == found.kept and not found.damaged
    found.tail = [rows[step] for step in sorted(rows) if all(_is_figure(rows[step], key) for key in SPIKE_METRICS)]
    return found


def _is_figure(row: dict[str, Any], key: str) -> bool:
    """Does the row have this key, with a number or null (see hpcgpt.run.metrics_file.finite)?"""
    return key in row and (row[key] is None or records.is_number(row[key]))
