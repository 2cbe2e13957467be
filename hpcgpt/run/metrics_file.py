"""What a run reports while it trains: metrics.jsonl, and the console.

metrics.jsonl has one JSON object for each optimizer step, one to a line: ``step`` (counted from 1), ``tokens``,
``samples``, ``time`` (unix seconds), ``attempt`` (its number), the ``train/...`` metrics, and on steps with an
evaluation the ``val/...`` metrics. It never has a step twice: a resumed run first cuts off the rows after its
checkpoint.

The console shows a bar on a terminal, and a plain line every few seconds in a log file.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpcgpt.output import streams
from hpcgpt.output.best_effort import only_informs
from hpcgpt.output.counted import counted
from hpcgpt.run import cut, run_folder
from hpcgpt.run.appended_file import AppendedFile
from hpcgpt.run.blocks_file import BlocksFile
from hpcgpt.storage import atomic

LINE_EVERY_S = 5.0
COPIED_AT_ONCE = 64 << 20  # bytes: takes a tenth of a second

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets, by a part of the device's name; the longer name is found first.
# Without an entry there is no MFU: a utilisation of the wrong chip is worse than none. A V100 has no bf16.
# AMD, GB200: https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md, MI300A:
# https://vengineer.hatenablog.com/entry/2023/12/11/080000. Torch shows an MI250X as two devices, each with half of its
# 383 TFLOP/s. AMD GPUs are untried.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "MI250X": 191.5e12,
    "MI300A": 980.6e12,
    "MI300X": 1307e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s; None if it is not in the table, or a slice of a GPU (MIG)."""
    if " MIG " in device_name:
        return None
    # Whole words: an RTX A1000 is no A100.
    return next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace numbers that are not finite, which JSON cannot represent, by None."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class MetricsFile:
    """Appends rows to metrics.jsonl. Rank 0 only.

    A full disk does not end the run: rows stay in memory until there is room. `lost` are the rows that were removed
    because this attempt repeats their steps, `tail` the last rows before them. Any thread may call `sync`.

    No two attempts write to one file, since orphans of earlier attempts may keep writing. Closing the file is recorded
    in metrics.closed, and at most one attempt can take that over (by renaming it): the file has no other writer then,
    and is truncated in place. So it is after a rollback, too. Without metrics.closed, as after a kill, the rows that
    stay are copied into a new file; of a large one in the background, during training. An orphan that was
    stopped while it made its own new file cannot replace this one: its temporary file is removed here, and before the
    rename it checks for a newer attempt (`check`). One that had taken metrics.closed over has opened the file before
    that, and truncates what this attempt does not use. (If a full disk has no room for a new file, the old one is
    truncated in place, without this protection from orphans.)

    A damaged line never ends the run. If a step before the cut has no row, the damaged lines are kept in
    metrics.damaged.jsonl, a warning and the event ``damaged_metrics`` name the missing steps, and the file has a gap
    there. Only the rows that hpcgpt.run.cut reads are looked at.
    """

    def __init__(
        self, path: Path, keep_below: int, check: Callable[[], None] = lambda: None, done: int | None = None
    ) -> None:
        """Open the file to append to it, after cutting off the rows of step `keep_below` and later.

        Rows after step `done` are lost; None: all that are cut off. Lines after the cut may be damaged: rows are
        flushed before each checkpoint, and those after it may be lost in part when a host dies.
        """
        self._path, self._check = path, check
        self._closed_path = path.with_name("metrics.closed")
        self._file = AppendedFile(path, check, self._opened_anew)
        self._has_no_other_writer = self._is_deferred = False
        self._appended: deque[dict[str, Any]] = deque()
        self._waiting = b""
        self._newest = 0  # no row has a higher step
        self._lock = threading.Lock()
        self._blocks = BlocksFile(path, check)
        for stale in (path, self._closed_path):
            atomic.remove_stale_temporaries(stale)
        self.cut_off(keep_below, done)

    def cut_off(self, keep_below: int, done: int | None = None) -> None:
        """Cut off the rows of step `keep_below` and later, also those that are queued; `done` as at the start."""
        with self._lock:
            if self._is_deferred:
                self._make_file()
            self._appended.clear()
            self._waiting = b""
            found = cut.find(self._path, keep_below, done)
            if found.damaged:
                found.kept += _keep_damaged_lines(self._path, found)
            self.lost, self.tail, self._file.has_ended = found.lost, found.tail, False
            in_place = found.is_prefix and (self._is_own() or self._take_over())
            self._has_no_other_writer = False
            self._start, self._kept, self._file.end = found.start, found.kept, found.size
            self._newest = keep_below - 1
            with only_informs("metrics.blocks"):
                self._blocks.cut_off(found.size)
            if in_place:
                self._check()
                os.ftruncate(self._file.descriptor, found.size)
                os.fsync(self._file.descriptor)
                self._has_no_other_writer = True
                return
            self._file.close()
            self._is_deferred = True
            if found.size <= COPIED_AT_ONCE:
                self._make_file()

    def append(self, row: dict[str, Any]) -> None:
        """Queue a row and return at once. `write_appended` or `sync` writes it, on another thread."""
        self._appended.append(row)

    def write_appended(self) -> None:
        """Write the queued rows. If that raises OSError, they stay queued."""
        with self._lock:
            self._write_waiting()
            with only_informs("metrics.blocks"):
                self._blocks.follow(self._file.end, self._newest)

    def sync(self) -> None:
        """Flush the rows to the disk, as must be done before a checkpoint of their steps becomes visible.

        Raises:
            OSError: rows could not be written.
        """
        with self._lock:
            self._write_waiting()
            # Of its own: another thread may open the file anew meanwhile.
            descriptor = os.dup(self._file.descriptor)
        try:
            os.fsync(descriptor)
            return
        except OSError as error:
            if error.errno in atomic.NO_ROOM:
                raise
        finally:
            with suppress(OSError):
                os.close(descriptor)
        with self._lock:
            self._file.reopen()
            os.fsync(self._file.descriptor)

    def _write_waiting(self) -> None:
        if self._is_deferred:
            self._make_file()
        while self._appended:
            row = self._appended.popleft()
            self._waiting += json.dumps(row).encode() + b"\n"
            self._newest = row["step"]
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written:]

    def _opened_anew(self) -> None:
        """Forget what was known of the file: another program may have written it."""
        self._has_no_other_writer = False
        self._blocks.begin_anew()

    def close(self) -> None:
        """Close the file. A second call, as after a failed rollback, does nothing."""
        self._is_deferred, self._file.has_ended = False, True
        self._blocks.close()
        if self._file.descriptor < 0:
            return
        is_own, identity = False, b""
        with suppress(OSError):
            is_own, identity = self._is_own(), _identity(self._file.descriptor)
        self._file.close()
        if is_own:
            with suppress(OSError):  # then the next attempt makes a new file
                self._check()
                atomic.write(self._closed_path, identity)

    def _is_own(self) -> bool:
        """Is `path` the file that this attempt writes, without another writer?"""
        return self._has_no_other_writer and self._file.is_at_path()

    def _take_over(self) -> bool:
        """Open the file if the last one that wrote it has closed it; return whether that is so.

        It is opened first: an attempt that is stopped in here then has a file that no newer attempt uses.
        """
        self._file.close()
        try:
            self._file.descriptor = os.open(self._path, os.O_RDWR)
            taken = self._closed_path.with_name(f".{self._closed_path.name}.{secrets.token_hex(8)}.tmp")
            self._closed_path.rename(taken)
            atomic.sync_folder(taken.parent)
            is_closed = taken.read_bytes() == _identity(self._file.descriptor)
            taken.unlink()
        except OSError:  # not closed, or another user's
            return False
        return is_closed

    def _make_file(self) -> None:
        """Copy what stays into a new file; if the disk has no room for one, truncate the old one in place."""
        try:
            with atomic.writing(self._path, self._check) as file:
                if self._start:
                    with open(self._path, "rb") as old:
                        atomic.copy_bytes(old, file, self._start)
                file.write(self._kept)
                file.flush()
                # Not opened by its name later: that may be a newer attempt's file then.
                self._file.descriptor = os.dup(file.fileno())
            self._has_no_other_writer = True
        except OSError as error:
            self._file.close()
            if error.errno not in atomic.NO_ROOM or not self._has_kept():
                raise
            streams.warn(f"there is no room for a new {self._path}: it is truncated in place")
            self._file.descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            self._check()  # after it was opened: what is truncated below is no newer attempt's
        os.ftruncate(self._file.descriptor, self._file.end)
        os.fsync(self._file.descriptor)
        self._is_deferred = False

    def _has_kept(self) -> bool:
        """Does the old file, if there is one, begin with what stays?"""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._start)
                return file.read(len(self._kept)) == self._kept
        except FileNotFoundError:
            return True


def _identity(descriptor: int) -> bytes:
    """Return what metrics.closed has: which file was closed, and its size."""
    about = os.fstat(descriptor)
    return f"{about.st_ino} {about.st_size}\n".encode()


def _keep_damaged_lines(path: Path, found: cut.Cut) -> bytes:
    """Move damaged lines to a file beside `path`, and report the missing steps. Returns what could not be moved."""
    missing = found.missing
    damaged_path = path.with_name("metrics.damaged.jsonl")
    lines = b"".join(line + b"\n" for line in found.damaged)
    problem, rest = "", b""
    try:
        with open(damaged_path, "ab") as file:
            file.write(lines)
    except OSError as error:
        problem, rest = f" ({error.strerror}: they stay where they are)", lines
    streams.warn(
        f"{path} has {counted(len(found.damaged), 'damaged line')}, kept in {damaged_path}{problem}: "
        f"{counted(len(missing), 'step')} without a row, from step {missing[0]:,} to step {missing[-1]:,}. Training is "
        "not affected",
    )
    try:
        run_folder.record(
            path.parent, "damaged_metrics", lines=len(found.damaged), missing_steps=len(missing),
            first_missing=missing[0], last_missing=missing[-1], kept_in=damaged_path.name,
        )  # fmt: skip
    except OSError as error:
        streams.warn(error)
    return rest


class Console:
    """Shows the progress of training. Rank 0 only."""

    def __init__(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._started_at, self._first_step = time.monotonic(), step
        self._next_line_at = 0.0
        self._bar = (
            tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, leave=True)
            if sys.stderr.isatty()
            else None
        )

    def step(self, row: dict[str, Any]) -> None:
        figures = f"loss {_number(row['train/loss'], 4)}  {row['train/tokens_per_s']:,.0f} tok/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(row["step"] - self._bar.n)
        now = time.monotonic()
        evaluated = "val/loss" in row
        if evaluated:
            self.say(
                f"step {row['step']:,}: validation loss {_number(row['val/loss'], 4)}, perplexity "
                f"{_number(row['val/perplexity'], 2)}, {_number(row['val/bits_per_byte'], 4)} bits per byte"
                + (f", training loss {_number(row['eval/train_loss'], 4)}" if "eval/train_loss" in row else "")
                + "".join(f", {name} accuracy {_number(value, 4)}" for name, value in _accuracies(row))
            )
        if self._bar is None and (now >= self._next_line_at or row["step"] == self._total):
            self._next_line_at = now + LINE_EVERY_S
            # A run that was stopped during an evaluation first reports the step that it resumed at: none is done yet.
            done = max(1, row["step"] - self._first_step)
            left_s = (self._total - row["step"]) * (now - self._started_at) / done
            self.say(
                f"step {row['step']:,}/{self._total:,}  {figures}  lr {row['train/lr']:.2e}  "
                f"grad norm {_number(row['train/grad_norm'], 3)}  {_clock(left_s)} left"
            )

    def went_back(self, step: int) -> None:
        """Compute the time left from the steps after this one: those before are repeated, and are not progress."""
        self._started_at, self._first_step = time.monotonic(), step

    def say(self, text: str) -> None:
        """Print a line above the bar; in a log, with the time before it."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _accuracies(row: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Return the accuracy of each of the tasks in a row, eval/TASK/accuracy."""
    begin, end = "eval/", "/accuracy"
    return [(key[len(begin) : -len(end)], row[key]) for key in row if key.startswith(begin) and key.endswith(end)]


def _number(value: float | None, places: int) -> str:
    return "none" if value is None else f"{value:.{places}f}"


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
