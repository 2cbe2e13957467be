"""The loss over the steps: points from a metrics.jsonl of any size, drawn with characters.

`LossCurve` reads a large file at SAMPLES places only, and then what is appended. A resumed run replaces its
metrics.jsonl by a new file, without the rows after the checkpoint: then the points are read again.

`draw` has three kinds of dots: braille (2 x 4 dots a character), half blocks (1 x 2) and ASCII (1 x 1).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from hpcgpt.run import records
from hpcgpt.status.figures import fitted

Dots = Literal["braille", "blocks", "ascii"]
Point = tuple[int, float]  # step, loss

WHOLE_BYTES = 4 << 20  # a file up to this size is read as a whole
SAMPLES = 1000
MOST_POINTS = 4000
LABEL = 8  # characters left of the curve

_CELL: dict[Dots, tuple[int, int]] = {"braille": (2, 4), "blocks": (1, 2), "ascii": (1, 1)}  # dots across, down
# The bit of each dot of a braille character, U+2800 and up, by column and row.
_BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLOCKS = " ▀▄█"


class LossCurve:
    """The points (step, training loss) of a metrics.jsonl, at most MOST_POINTS of them. Not thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: tuple[int, int] = (0, 0)  # device and inode
        self._end = 0  # everything before it has been read
        self._losses: dict[int, float] = {}

    @property
    def points(self) -> list[Point]:
        return sorted(self._losses.items())

    def refresh(self) -> None:
        """Read what is new. Without a file there are no points.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            self._losses, self._end = {}, 0
            return
        with file:
            about = os.fstat(file.fileno())
            if (about.st_dev, about.st_ino) != self._file or about.st_size < self._end:
                self._file, self._end, self._losses = (about.st_dev, about.st_ino), 0, {}
                if about.st_size > WHOLE_BYTES:
                    self._sample(file, about.st_size)
            file.seek(self._end)
            lines = file.read(max(0, about.st_size - self._end)).split(b"\n")
            self._end += sum(len(line) + 1 for line in lines[:-1])  # the last one may still be written
            self._add(lines[:-1])

    def _sample(self, file: BinaryIO, size: int) -> None:
        """Read a line at each of SAMPLES places, and let the next refresh begin near the end."""
        for number in range(SAMPLES):
            file.seek(size * number // SAMPLES)
            if number:
                file.readline()  # the rest of a line
            self._add([file.readline()])
        file.seek(max(0, size - (WHOLE_BYTES >> 4)))
        file.readline()
        self._end = min(file.tell(), size)

    def _add(self, lines: Sequence[bytes]) -> None:
        for row in records.rows_of(lines, ("step", "time", "train/loss")):
            if "train/loss" in row:
                self._losses[row["step"]] = float(row["train/loss"])
        while len(self._losses) > MOST_POINTS:
            self._losses = dict(sorted(self._losses.items())[::2])


def dots_for(encoding: str | None, terminal: str) -> Dots:
    """Return the finest dots that a terminal shows: the fonts of Linux's own console have no braille."""
    if "utf" not in (encoding or "").lower():
        return "ascii"
    return "blocks" if terminal in ("linux", "cons25") else "braille"


def draw(points: Sequence[Point], width: int, height: int, dots: Dots) -> list[str]:
    """Draw a curve in `height` lines of at most `width` characters: the curve, and the steps below it.

    Each column has the mean of its points, and is connected with the column before it.
    """
    across, down = _CELL[dots]
    columns, rows = (width - LABEL - 2) * across, (height - 1) * down
    if columns < 2 * across or rows < down or height < 2:
        return []
    if len(points) < 2:
        return ["(no curve yet: fewer than two steps)"]
    first, last = points[0][0], points[-1][0]
    means = _means(points, columns)
    known = [mean for mean in means if mean is not None]
    low, high = min(known), max(known)
    cells = [[0] * (width - LABEL - 2) for _ in range(height - 1)]
    before: int | None = None
    for column, mean in enumerate(means):
        if mean is None:
            continue
        row = round((high - mean) / ((high - low) or 1.0) * (rows - 1))
        for line in range(row, row + 1) if before is None else range(min(row, before + 1), max(row, before - 1) + 1):
            if 0 <= line < rows:
                cells[line // down][column // across] |= _bit(dots, column % across, line % down)
        before = row
    labels = {height - 2: low, 0: high} | ({(height - 2) // 2: (high + low) / 2} if height > 5 else {})
    # As many places as are needed to see the range.
    places = min(6, max(2, 1 - math.floor(math.log10(high - low)))) if high > low else 2
    lines = []
    for number, line_cells in enumerate(cells):
        value = labels.get(number)
        label = "" if value is None else fitted(value, LABEL, places)
        lines.append(
            f"{label:>{LABEL}} {'|' if dots == 'ascii' else '│'}{''.join(_character(dots, c) for c in line_cells)}"
        )
    left, right = f"{first:,}", f"step {last:,}"
    lines.append(" " * (LABEL + 2) + left + right.rjust(max(1 + len(right), width - LABEL - 2 - len(left))))
    return [line.rstrip() for line in lines]


def _means(points: Sequence[Point], columns: int) -> list[float | None]:
    """Return the mean loss of each column; None for a column between two points that are far apart."""
    first, last = points[0][0], points[-1][0]
    sums, counts = [0.0] * columns, [0] * columns
    for step, loss in points:
        column = (step - first) * (columns - 1) // max(1, last - first)
        sums[column] += loss
        counts[column] += 1
    return [total / number if number else None for total, number in zip(sums, counts, strict=True)]


def _bit(dots: Dots, column: int, row: int) -> int:
    return _BRAILLE[column][row] if dots == "braille" else 1 << row


def _character(dots: Dots, bits: int) -> str:
    if dots == "braille":
        return chr(0x2800 + bits) if bits else " "
    return _BLOCKS[bits] if dots == "blocks" else " *"[bits]
