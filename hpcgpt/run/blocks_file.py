"""Writes metrics.blocks (hpcgpt.run.blocks) as rows are added to metrics.jsonl. Rank 0 only.

It is made from the bytes of metrics.jsonl, a piece at a time, so a file that is missing or does not agree with the rows
is made anew during training, at the price of some milliseconds a step. Each attempt has a file of its own, since
orphans of earlier ones may keep writing. No torch in here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hpcgpt.run import blocks
from hpcgpt.run.blocks import BLOCK, HEADER, HEADER_BYTES
from hpcgpt.storage import atomic

PIECE_BYTES = 128 << 10  # about 400 rows


class BlocksFile:
    """The blocks of the rows that are in metrics.jsonl. Not thread-safe."""

    def __init__(self, metrics: Path, check: Callable[[], None]) -> None:
        """Prepare; the file is opened when there is something to write. `check` as in atomic.writing."""
        self._metrics, self._path, self._check = metrics, metrics.with_name(blocks.FILE_NAME), check
        self._descriptor = -1
        self._size = 0  # of metrics.jsonl, up to where the file may be right before it is opened
        self._count, self._at = 0, 0  # blocks in it; where their rows end
        self._before: np.void | None = None  # the last of them
        self._piece = PIECE_BYTES  # bytes of rows that are read at a time
        atomic.remove_stale_temporaries(self._path)

    def cut_off(self, size: int) -> None:
        """Forget the blocks of rows that are beyond the first `size` bytes of metrics.jsonl.

        Raises:
            OSError: the file cannot be read or truncated.
        """
        self._size, self._piece = size, PIECE_BYTES
        if self._descriptor >= 0:
            with open(self._path, "rb") as stored:
                self._continue_after(_until(stored, self._count, size))
            os.ftruncate(self._descriptor, HEADER_BYTES + self._count * BLOCK.itemsize)

    def follow(self, size: int, highest: int) -> None:
        """Write the blocks of some more rows of the first `size` bytes, whose last step is `highest`.

        Raises:
            OSError: a file cannot be read or written; nothing is lost.
        """
        if size <= blocks.WHOLE_BYTES or size - self._at < self._piece or self._piece > blocks.LONGEST_BLOCK:
            return
        if self._descriptor < 0:
            self._open()
        with open(self._metrics, "rb") as rows:
            units, _ = blocks.read_rows(rows, self._at, self._piece, self._before, highest)
        whole = blocks.joined(units, self._before, width=blocks.WIDTH)[:-1]  # rows may be added to the last one
        if not len(whole):
            self._piece *= 2  # if that does not help, readers read the rest row by row
            return
        try:
            os.pwrite(self._descriptor, whole.tobytes(), HEADER_BYTES + self._count * BLOCK.itemsize)
        except OSError as error:
            if error.errno not in atomic.NO_ROOM:  # as ESTALE: this descriptor is of no use any more
                self.begin_anew()
            raise
        self._count += len(whole)
        self._at, self._before = int(whole[-1]["end"]), whole[-1]

    def begin_anew(self) -> None:
        """Open the file anew with the next block, and look how many agree with the rows, which may be others now."""
        if self._descriptor >= 0:
            self._size = self._at
        self.close()
        self._at, self._piece = 0, PIECE_BYTES

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)

    def _open(self) -> None:
        """Make a new file of the blocks so far that agree with the rows."""
        count = 0
        with suppress(OSError), open(self._path, "rb") as stored, open(self._metrics, "rb") as rows:
            count = blocks.sound(stored, rows, self._size)
        with atomic.writing(self._path, self._check) as file:
            if count:
                with open(self._path, "rb") as stored:
                    atomic.copy_bytes(stored, file, HEADER_BYTES + count * BLOCK.itemsize)
            else:
                file.write(HEADER)
        self._descriptor = os.open(self._path, os.O_RDWR)
        self._continue_after(count)

    def _continue_after(self, count: int) -> None:
        """Continue after the first `count` blocks."""
        self._count, self._at, self._before = count, 0, None
        if count:
            with open(self._path, "rb") as stored:
                self._before = blocks.read_blocks(stored, count - 1, 1)[0]
            self._at = int(self._before["end"])


def _until(stored: BinaryIO, count: int, size: int) -> int:
    """Return how many of `count` blocks end within the first `size` bytes of metrics.jsonl."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if int(blocks.read_blocks(stored, middle, 1)[0]["end"]) <= size:
            low = middle + 1
        else:
            high = middle
    return low
