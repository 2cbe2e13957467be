"""The lines of events.jsonl and metrics.jsonl, validated so that no reader fails on them.

After crashes, full disks, other versions of this program and manual edits, a line may lack a field, or have null, NaN
or a text instead of a number. All lines are validated here, once:

    event    has a finite `time` and a text `event`
    row      has a finite `time` and a `step`

    Every other known field (`_KINDS`) has its type and a plausible value, or is removed: readers use
    `record.get(key, default)`. Unknown fields are left as they are, except that NaN is removed.

Lines without `time` and `event`, or `time` and `step`, are left out. Of several rows of a step the last one counts.

A run of a million steps has half a gigabyte of rows. `rows` reads them all, line by line, and keeps the fields that its
caller needs; hpcgpt.run.blocks keeps none of them; `newest_rows` reads only the end of the file.

No torch in here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson

Record = Mapping[str, Any]

LATEST_S = 1e11  # unix seconds of the year 5138, and longer than any duration
LARGEST = 2**63
TAIL_BYTES = 4 << 20  # about 10,000 rows
NEWEST_ROWS = 200
LAST_ROWS = 3  # not only one, which may be damaged
BLOCK_BYTES = 4 << 20
EVENT_TAIL_BYTES = 256 << 10  # about a thousand events


def events(folder: Path, brief: bool = False) -> list[Record]:
    """Read the events of a run folder.

    With `brief` without events of saves that are older than the last EVENT_TAIL_BYTES, except for the newest of them:
    of a long run nearly all events are those, and only goodput needs them.
    """
    found: list[Record] = []
    newest_save: tuple[int, bytes] | None = None  # of those that are left out: where it belongs, and its line
    try:
        file = open(folder / "events.jsonl", "rb")  # noqa: SIM115
    except FileNotFoundError:
        return []
    with file:
        left = os.fstat(file.fileno()).st_size - EVENT_TAIL_BYTES if brief else 0
        for line in file:
            left -= len(line)
            if left > 0 and b'"event": "save' in line:
                newest_save = (len(found), line) if b'"event": "save"' in line else newest_save
            elif event := _event(line):
                found.append(event)
    if newest_save and (event := _event(newest_save[1])):
        found.insert(newest_save[0], event)
    return found


def _event(line: bytes) -> Record:
    """Parse a line of events.jsonl; {} if it is no event."""
    event = _cleaned(parsed(line))
    return event if "time" in event and "event" in event else {}


def rows(folder: Path, keys: Collection[str] | None = None) -> list[Record]:
    """Read the rows of a run folder's metrics.jsonl, one for each step; with `keys` only these fields of each."""
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            return rows_of(file, keys)
    except FileNotFoundError:
        return []


def newest_rows(folder: Path, end: int | None = None) -> list[Record]:
    """Read the last NEWEST_ROWS rows, and those before them that have an evaluation, of the last TAIL_BYTES.

    `end`: where metrics.jsonl ends for this; with None it is read to its end.
    """
    try:
        with open(folder / "metrics.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size if end is None else end
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read(min(size, TAIL_BYTES)).split(b"\n")
    except FileNotFoundError:
        return []
    if size > TAIL_BYTES:
        del lines[0]  # it begins in the middle of a line
    evaluations = [line for line in lines[:-NEWEST_ROWS] if b'"val/' in line]
    return rows_of([*evaluations, *lines[-NEWEST_ROWS:]])


def rows_of(lines: Iterable[bytes], keys: Collection[str] | None = None) -> list[Record]:
    """Parse lines of metrics.jsonl, as `rows` does."""
    found = {row["step"]: row for line in lines if (row := row_of(line, keys))}
    return list(found.values())


def row_of(line: bytes, keys: Collection[str] | None = None) -> Record:
    """Parse a line of metrics.jsonl; {} if it is no row."""
    row = parsed(line)
    if keys is not None:
        row = {key: row[key] for key in keys if key in row}
    row = _cleaned(row)
    return row if "time" in row and "step" in row else {}


def parsed(line: bytes) -> dict[str, Any]:
    """Parse a line; {} if it is no JSON object. orjson is fast, but refuses NaN and numbers of any length."""
    try:
        row = orjson.loads(line)
    except ValueError:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return {}
    return row if isinstance(row, dict) else {}


def _cleaned(record: dict[str, Any]) -> dict[str, Any]:
    """Remove the known fields that have a wrong type or an implausible value from `record`, and return it."""
    bad = [key for key, value in record.items() if not _KINDS.get(key, _can_be_shown)(value)]
    for key in bad:
        del record[key]
    return record


def is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < LARGEST)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_time(value: Any) -> bool:
    """Is it a moment in unix seconds, or a duration in seconds?"""
    return type(value) in (float, int) and 0 <= value < LATEST_S


def _can_be_shown(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _is_status(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def _is_text(value: Any) -> bool:
    """Is it text that can be printed? Half of a surrogate pair cannot."""
    return type(value) is str and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(_is_text(item) for item in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("time", "queued_at", "started_at", "began_at", "since", "lost_until"), is_time),
    **dict.fromkeys(("seconds", "stall_s", "imports_s", "meet_s", "warm_up_s", "load_s", "lost_s"), is_time),
    **dict.fromkeys(("silent_s", "local_s", "usual_s", "factor"), is_time),
    **dict.fromkeys(("step", "attempt", "total_steps", "lost_steps", "spiked_step", "skipped_batches"), is_count),
    **dict.fromkeys(("world_size", "from_step", "rank", "bytes", "tokens", "samples"), is_count),
    "status": _is_status,
    **dict.fromkeys(("event", "job", "next_job", "reason", "problem", "host", "settings"), _is_text),
    **dict.fromkeys(("hosts", "excluded"), _are_texts),
    **dict.fromkeys(("train/step_s", "train/data_wait_s", "val/elapsed_s"), is_time),
    **dict.fromkeys(("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/mfu"), is_number),
    **dict.fromkeys(("val/loss", "val/perplexity", "val/bits_per_byte", "loss"), is_number),
}
