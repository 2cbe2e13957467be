"""The lines of events.jsonl and metrics.jsonl, read so that no reader can fail over one of them.

A run folder outlives crashes, full disks, other versions of this program and people with editors. So a line may lack
a field, hold null or NaN, or a text where a number belongs. What is read here is sorted out once, at the door:

    event    has a finite `time` and a text `event`
    row      has a finite `time` and a `step`

    Every other field that this program knows (`_KINDS`) is of its type and within reason, or it is not there:
    readers say `record.get(key, default)`. Fields that it does not know are left as they are, but for NaN.

Lines without `time` and `event`, or `time` and `step`, are left out. A row of a step that is there already replaces it.

No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcgpt.run import run_folder

Record = Mapping[str, Any]

LATEST_S = 1e11  # unix seconds of the year 5138, and longer than anything lasts
LARGEST = 2**63


def events(folder: Path) -> list[Record]:
    """The events of a run folder."""
    found = (_cleaned(event) for event in run_folder.events(folder))
    return [event for event in found if "time" in event and "event" in event]


def rows(folder: Path) -> list[Record]:
    """The rows of a run folder's metrics.jsonl, a step once."""
    found: dict[int, Record] = {}
    for line in run_folder.read_rows(folder / "metrics.jsonl", torn=True):
        row = _cleaned(line)
        if "time" in row and "step" in row:
            found[row["step"]] = row
    return list(found.values())


def _cleaned(record: dict[str, Any]) -> Record:
    """The same without the known fields that are of a wrong type or out of all reason. Changes `record`."""
    bad = [key for key, value in record.items() if not _KINDS.get(key, _can_be_shown)(value)]
    for key in bad:
        del record[key]
    return record


def is_number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < LARGEST)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


def is_time(value: Any) -> bool:
    """A moment in unix seconds, or a length of time in seconds."""
    return type(value) in (float, int) and 0 <= value < LATEST_S


def _can_be_shown(value: Any) -> bool:
    return type(value) is not float or math.isfinite(value)


def _is_status(value: Any) -> bool:
    return type(value) is int and abs(value) < LARGEST


def _is_text(value: Any) -> bool:
    """Text that can be printed: half of a surrogate pair cannot."""
    return type(value) is str and (value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value))


def _are_texts(value: Any) -> bool:
    return type(value) is list and all(_is_text(item) for item in value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("time", "queued_at", "started_at", "began_at", "since", "lost_until"), is_time),
    **dict.fromkeys(("seconds", "stall_s", "imports_s", "meet_s", "warm_up_s", "load_s", "lost_s"), is_time),
    **dict.fromkeys(("silent_s", "local_s", "usual_s", "factor"), is_time),
    **dict.fromkeys(("step", "attempt", "total_steps", "lost_steps", "spiked_step", "skipped_batches"), is_count),
    **dict.fromkeys(("world_size", "rank", "bytes", "tokens", "samples"), is_count),
    "status": _is_status,
    **dict.fromkeys(("event", "job", "next_job", "reason", "problem", "host"), _is_text),
    **dict.fromkeys(("hosts", "excluded"), _are_texts),
    **dict.fromkeys(("train/step_s", "train/data_wait_s", "val/elapsed_s"), is_time),
    **dict.fromkeys(("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/mfu"), is_number),
    **dict.fromkeys(("val/loss", "val/perplexity", "val/bits_per_byte", "loss"), is_number),
}
