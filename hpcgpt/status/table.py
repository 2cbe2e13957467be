"""The table of many runs: a line for each, which fits 80 columns, and below it why jobs wait. Where there are fewer
columns, figures are left out, from the right.

RUN                   STATE    STEP/TOTAL     LOSS  TOK/S   LEFT  CHANGED
gpt2-124m             running   12.3k/19.1k  3.4120  1.25M  3h12m  4s
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcgpt.errors import UserError, sentence
from hpcgpt.output import terminal
from hpcgpt.slurm.queue import Queue, QueuedJob
from hpcgpt.status import run_status
from hpcgpt.status.as_text import expected_start, reason_in_words
from hpcgpt.status.figures import UNKNOWN, columns, count, fitted, pad, short_span, shorten
from hpcgpt.status.run_state import WAITING

WIDTH = 80
UNREADABLE = "unreadable"
_HEAD = ("RUN", "STATE", "STEP/TOTAL", "LOSS", "TOK/S", "LEFT", "CHANGED")
_LOSS = 7
_WIDTHS = (0, 10, 13, _LOSS, 6, 6, 7)  # of the columns; the first one gets the rest
_GAP = 1
_LEAST_NAME = 12  # figures are left out rather than that names get less


def brief_or_unreadable(folder: Path, now: float, queue: Queue) -> dict[str, Any]:
    """Collect the line of a run; of one that cannot be read the keys `run`, `state` and `reason` only."""
    try:
        return run_status.brief(folder, now, queue)
    except (OSError, UserError) as error:
        return {"run": str(folder), "state": UNREADABLE, "reason": sentence(error)}


def lines(found: Sequence[dict[str, Any]], now: float, width: int = WIDTH) -> list[str]:
    """Format what `run_status.brief` returned for each run. No line is wider than `width` columns, unless it has a
    command to type, or there are not even columns for name and state.
    """
    names = _names([run["run"] for run in found])
    widths = list(_WIDTHS)
    while len(widths) > 2 and _room(widths, width) < _LEAST_NAME:
        widths.pop()
    widths[0] = max(1, min(_room(widths, width), max([len(_HEAD[0]), *map(columns, names)])))
    made = [_line(_HEAD, widths)]
    made += [_line(_cells(name, run, now), widths) for name, run in zip(names, found, strict=True)]
    notes = [(shorten(name, max(1, width - 2)), _note(run, now)) for name, run in zip(names, found, strict=True)]
    below = [line for name, note in notes if note for line in _wrapped(f"{name}: {note}", width)]
    return [line.rstrip() for line in [*made, *([""] if below else []), *below]]


def _room(widths: Sequence[int], width: int) -> int:
    """Return the characters that are left for the names."""
    return width - sum(widths[1:]) - _GAP * (len(widths) - 1)


def without_run(jobs: Sequence[tuple[QueuedJob, str]], now: float, width: int = WIDTH) -> list[str]:
    """Describe waiting jobs that have no run folder yet; `jobs` are from queue.without_run."""
    found = []
    for queued, command in jobs:
        job = queued.as_dict()
        start = f"; starts {expected_start(job, now)}" if job["starts_at"] is not None else ""
        action = f"; {job['action']}" if job["waiting_helps"] is False else ""
        text = f"job {job['id']}, not started yet: {command}{reason_in_words(job)}{action}{start}"
        found += _wrapped(terminal.printable(text), width)
    return found


def _wrapped(text: str, width: int) -> list[str]:
    # Commands to type stay in one piece.
    indent = "    " if width > 20 else ""
    return textwrap.wrap(text, max(1, width), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _names(folders: Sequence[str]) -> list[str]:
    """Return the shortest names that are different: without the folder that all are in."""
    paths = [Path(folder) for folder in folders]
    parents = {path.parent for path in paths}
    if len(parents) == 1:
        return [terminal.printable(path.name) for path in paths]
    return [terminal.printable(folder) for folder in folders]


def _cells(name: str, run: dict[str, Any], now: float) -> tuple[str, ...]:
    if run["state"] == UNREADABLE:
        return (name, UNREADABLE, *[UNKNOWN] * 5)
    total = f"/{count(run['total_steps'])}" if run["total_steps"] else ""
    running = run["state"] == "running"
    changed = run["changed_at"]
    return (
        name,
        run["state"],
        f"{count(run['step'])}{total}",
        UNKNOWN if run["train/loss"] is None else fitted(run["train/loss"], _LOSS, 4),
        count(run["train/tokens_per_s"]) if running else UNKNOWN,
        short_span(run["time_left_s"]) if running else UNKNOWN,
        short_span(max(0.0, now - changed)) if changed is not None else UNKNOWN,
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, state, *rest = cells
    made = [pad(shorten(name, widths[0]), widths[0]), state.ljust(widths[1])]
    made += [cell.rjust(width) for cell, width in zip(rest, widths[2:], strict=False)]
    return (" " * _GAP).join(made)


def _note(run: dict[str, Any], now: float) -> str:
    """Return what a line has no room for: why a job waits and until when, or why a run cannot be read."""
    if run["state"] == UNREADABLE:
        return terminal.printable(run["reason"])
    job = run["job"]
    if run["state"] not in WAITING or not job or "state" not in job:
        return ""
    if job["waiting_helps"] is False:
        return f"job {job['id']}{reason_in_words(job)}; {job['action']}"
    start = f"; starts {expected_start(job, now)}" if job["starts_at"] is not None else ""
    return f"job {job['id']}{reason_in_words(job)}{start}"
