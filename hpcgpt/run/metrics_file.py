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
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpcgpt.output import streams
from hpcgpt.run import records, run_folder
from hpcgpt.storage import atomic

LINE_EVERY_S = 5.0
TAIL_ROWS = 1000
SPIKE_METRICS = ("train/loss", "train/grad_norm")  # read by hpcgpt.training.spikes

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

    A full disk does not end the run: rows stay in memory until there is room. `cut_off` are the rows that were removed
    because this attempt repeats their steps, `tail` the last rows before them. Any thread may call `sync`.

    Each attempt makes a new file, so orphans of earlier attempts keep writing to the old one. An orphan that was
    stopped while it made its own new file cannot replace this one: its temporary file is removed here, and before the
    rename it checks for a newer attempt (`check`). (If a full disk has no room for a new file, the old one is truncated
    in place, without this protection from orphans.)

    A damaged line never ends the run. If a step before the cut has no row, the damaged lines are kept in
    metrics.damaged.jsonl, a warning and the event ``damaged_metrics`` name the missing steps, and the file has a gap
    there.
    """

    def __init__(self, path: Path, keep_below: int, check: Callable[[], None] = lambda: None) -> None:
        """Open the file to append to it, after cutting off the rows of step `keep_below` and later.

        Lines after the cut may be damaged: rows are flushed before each checkpoint, and those after it may be lost in
        part when a host dies.
        """
        atomic.remove_stale_temporaries(path)
        rows, damaged = _read(path)
        kept = [row for row in rows if row["step"] < keep_below]
        content = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if damaged and len(kept) < keep_below - 1:
            content += _keep_damaged_lines(path, kept, keep_below, damaged)
        _rewrite(path, content, check)
        timed = [row for row in rows if all(records.is_time(row.get(key)) for key in ("time", "train/step_s"))]
        self.cut_off = [row for row in timed if row["step"] >= keep_below]
        self.tail = [row for row in kept[-TAIL_ROWS:] if all(_is_figure(row, key) for key in SPIKE_METRICS)]
        self._path, self._end, self._waiting = path, len(content), b""
        self._descriptor = os.open(path, os.O_WRONLY)
        self._appended: deque[dict[str, Any]] = deque()
        self._lock = threading.Lock()

    def append(self, row: dict[str, Any]) -> None:
        """Queue a row and return at once. `write_appended` or `sync` writes it, on another thread."""
        self._appended.append(row)

    def write_appended(self) -> None:
        """Write the queued rows. If that raises OSError, they stay queued."""
        with self._lock:
            self._write_waiting()

    def sync(self) -> None:
        """Flush the rows to the disk, as must be done before a checkpoint of their steps becomes visible.

        Raises:
            OSError: rows could not be written.
        """
        with self._lock:
            self._write_waiting()
        os.fsync(self._descriptor)

    def _write_waiting(self) -> None:
        while self._appended:
            self._waiting += json.dumps(self._appended.popleft()).encode() + b"\n"
        while self._waiting:
            try:
                written = os.pwrite(self._descriptor, self._waiting, self._end)
            except OSError as error:
                raise atomic.with_path_and_free_space(error, self._path) from error
            self._end += written
            self._waiting = self._waiting[written:]

    def close(self) -> None:
        """Close the file. A second call, as after a failed rollback, does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _rewrite(path: Path, content: bytes, check: Callable[[], None]) -> None:
    """Replace the file; if the disk has no room for a new one, truncate the old one in place."""
    try:
        atomic.write(path, content, check)
        return
    except OSError as error:
        if error.errno not in atomic.NO_ROOM:
            raise
        if path.exists() and not path.read_bytes().startswith(content):
            raise
    streams.warn(f"there is no room for a new {path}: it is truncated in place")
    check()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """Read the rows of a metrics.jsonl, ordered by step, and its damaged lines."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    rows: dict[int, dict[str, Any]] = {}
    damaged = []
    for line in filter(None, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        sound = isinstance(row, dict) and records.is_count(row.get("step")) and records.is_time(row.get("time", 0.0))
        if sound and row["step"] not in rows:
            rows[row["step"]] = row
        elif not sound:
            damaged.append(line)
    return [rows[step] for step in sorted(rows)], damaged


def _is_figure(row: dict[str, Any], key: str) -> bool:
    """Does the row have this key, with a number or null (see `finite`)?"""
    return key in row and (row[key] is None or records.is_number(row[key]))


def _keep_damaged_lines(path: Path, kept: list[dict[str, Any]], keep_below: int, damaged: list[bytes]) -> bytes:
    """Move damaged lines to a file beside `path`, and report the missing steps. Returns what could not be moved."""
    have = {row["step"] for row in kept}
    missing = [step for step in range(1, keep_below) if step not in have]
    damaged_path = path.with_name("metrics.damaged.jsonl")
    lines = b"".join(line + b"\n" for line in damaged)
    problem, rest = "", b""
    try:
        with open(damaged_path, "ab") as file:
            file.write(lines)
    except OSError as error:
        problem, rest = f" ({error.strerror}: they stay where they are)", lines
    streams.warn(
        f"{path} has {len(damaged)} damaged lines, kept in {damaged_path}{problem}: {len(missing):,} steps have no "
        f"row, from step {missing[0]:,} to step {missing[-1]:,}. Training is not affected",
    )
    try:
        run_folder.record(
            path.parent, "damaged_metrics", lines=len(damaged), missing_steps=len(missing), first_missing=missing[0],
            last_missing=missing[-1], kept_in=damaged_path.name,
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
