"""The lines of events.jsonl and metrics.jsonl, validated so that no reader fails on them.

After crashes, full disks, other versions of this program and manual edits, a line may lack a field, or have null, NaN
or a text instead of a number. All lines are validated here, once:

    event    has a finite `time` and a text `event`
    row      has a finite `time` and a `step`

    Every other known field (`_KINDS`) has its type and a plausible value, or is removed: readers use
    `record.get(key, default)`. Unknown fields are left as they are, except that NaN is removed.

Lines without `time` and `event`, or `time` and `step`, are left out. Of several rows of a step the last one counts.

No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcgpt.run import run_folder

Record = Mapping[str, Any]

LATEST_S = 1e11  # unix seconds of the year 5138, and longer than any duration
LARGEST = 2**63


def events(folder: Path) -> list[Record]:
    """Read the events of a run folder."""
    found = (_cleaned(event) for event in run_folder.events(folder))
    return [event for event in found if "time" in event and "event" in event]


def rows(folder: Path) -> list[Record]:
    """Read the rows of a run folder's metrics.jsonl, one for each step."""
    found: dict[int, Record] = {}
    for line in run_folder.read_rows(folder / "metrics.jsonl", torn=True):
        row = _cleaned(line)
        if "time" in row and "step" in row:
            found[row["step"]] = row
    return list(found.values())


def _cleaned(record: dict[str, Any]) -> Record:
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
    **dict.fromkeys(("world_size", "rank", "bytes", "tokens", "samples"), is_count),
    "status": _is_status,
    **dict.fromkeys(("event", "job", "next_job", "reason", "problem", "host"), _is_text),
    **dict.fromkeys(("hosts", "excluded"), _are_texts),
    **dict.fromkeys(("train/step_s", "train/data_wait_s", "val/elapsed_s"), is_time),
    **dict.fromkeys(("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/mfu"), is_number),
    **dict.fromkeys(("val/loss", "val/perplexity", "val/bits_per_byte", "loss"), is_number),
}
