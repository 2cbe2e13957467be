"""The live view of `hpcgpt status --watch`: what is on the screen, as lines; and the same in one plain line.

Everything is computed from a Snapshot, so it can be shown at any size, and tested without a terminal.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcgpt.output import terminal
from hpcgpt.output.counted import counted
from hpcgpt.run.goodput import Goodput
from hpcgpt.status import curve, table
from hpcgpt.status.as_text import queue_lines
from hpcgpt.status.curve import Dots, Point
from hpcgpt.status.figures import columns, count, cut, figure, moment, short_span, shorten, span
from hpcgpt.status.run_state import WAITING
from hpcgpt.status.screen import BOLD, CYAN, DIM, GREEN, RED, YELLOW, Line
from hpcgpt.status.why import compressed

_COLOURS = {"running": GREEN, "finished": GREEN, "starting": CYAN, "stale": RED, "failed": RED, "held": YELLOW,
            "pending": YELLOW, "requeued": YELLOW, "unreadable": RED}  # fmt: skip
_KEYS = "q: quit"
ZOOM = 5  # the zoomed curve has the last fifth of the steps
LEAST_CURVE = 4  # lines
NOTE_LINES = 3  # of a reason at most: a crash's may have hundreds of characters
LEAST_NAME = 12  # characters: with less room the clock and the keys are left out


@dataclass(frozen=True)
class Snapshot:
    """What was read at one moment. `runs` are from `run_status.brief`; `points` and `goodput` those of a single run.

    `problem`: why the newest reading failed; then everything else is from the last one that did not.
    """

    at: float
    runs: Sequence[dict[str, Any]] = ()
    points: Sequence[Point] = ()
    goodput: Goodput | None = None
    problem: str = ""
    slurm_problem: str = ""


def lines(snapshot: Snapshot, width: int, height: int, dots: Dots, zoomed: bool = False) -> list[Line]:
    """Compose the screen: one run with its curve, or a table of several."""
    if len(snapshot.runs) == 1 and snapshot.runs[0]["state"] != table.UNREADABLE:
        made = _one(snapshot, width, height, dots, zoomed)
    else:
        made = _many(snapshot, width)
    return [(cut(terminal.printable(text), width), style) for text, style in made[:height]]


def plain_line(run: dict[str, Any], now: float) -> str:
    """Describe a run in one line for a log, or a terminal that cannot draw; without the time of day."""
    text = f"{run['run']}: {run['state']}"
    if run["state"] == table.UNREADABLE or run["state"] in ("failed", "stopped", "saved", "held"):
        text += f" ({run['reason']})" if run["reason"] else ""
    if run["state"] == table.UNREADABLE:
        return terminal.printable(text)
    if queue := queue_lines(run, now):
        text += f", {queue[0]}"
    total = f"/{run['total_steps']:,}" if run["total_steps"] else ""
    text += f", step {run['step']:,}{total}"
    if run["train/loss"] is not None:
        text += f", loss {run['train/loss']:.4f}, {figure(run['train/tokens_per_s'], ',.0f')} tokens/s"
    if run["state"] == "running" and run["time_left_s"] is not None:
        text += f", {span(run['time_left_s'])} left"
    return terminal.printable(text)


def _many(snapshot: Snapshot, width: int) -> list[Line]:
    shown = table.lines(snapshot.runs, snapshot.at, width) if snapshot.runs else ["no runs (yet)"]
    states = [""] + [str(run["state"]) for run in snapshot.runs]
    styles = [BOLD, *(_COLOURS.get(state, "") for state in states[1:])]
    styles += [DIM] * max(0, len(shown) - len(styles))
    end = [("", ""), *_problems(snapshot), (f"{_clock(snapshot.at)}  {_KEYS}", DIM)]
    return [*zip(shown, styles, strict=False), *end]


def _one(snapshot: Snapshot, width: int, height: int, dots: Dots, zoomed: bool) -> list[Line]:
    run = snapshot.runs[0]
    state = run["state"]
    right = f"{_clock(snapshot.at)}  {_KEYS}, z: {'whole curve' if zoomed else 'zoom'}"
    room = width - len(right) - len(state) - 4
    left = f"{shorten(run['run'], room if room >= LEAST_NAME else max(1, width - len(state) - 2))}  {state}"
    head = f"{left}{right.rjust(width - columns(left))}" if room >= LEAST_NAME else left
    made: list[Line] = [(head, f"{BOLD};{_COLOURS[state]}" if state in _COLOURS else BOLD)]
    notes = [run["reason"]] if run["reason"] and state != "finished" else []
    notes += queue_lines(run, snapshot.at)
    if state == "stale":
        notes.append(f"nothing written for {span(run['still_s'])}; `hpcgpt status {run['run']}` says more")
    made += [(line, YELLOW) for note in notes for line in textwrap.wrap(note, max(20, width), max_lines=NOTE_LINES)]
    made += _problems(snapshot)
    made += [(line, "") for line in _figures(run, snapshot, width)]
    room = height - len(made) - 1
    points = snapshot.points
    if zoomed and points:
        first = points[0][0] + (points[-1][0] - points[0][0]) * (ZOOM - 1) // ZOOM
        points = [point for point in points if point[0] >= first]
    if room >= LEAST_CURVE:
        made.append(("", ""))
        made += [(line, CYAN) for line in curve.draw(points, width, room, dots)]
    return made


def _figures(run: dict[str, Any], snapshot: Snapshot, width: int) -> list[str]:
    """Return the lines with the figures of a run."""
    found = [_progress(run, width)]
    loss = [f"loss {figure(run['train/loss'], '.4f')}"]
    if run["val/loss"] is not None:
        loss.append(f"validation {run['val/loss']:.4f} at step {run['val_step']:,}")
    if run["state"] == "running":
        loss.append(f"{count(run['train/tokens_per_s'])} tokens/s")
        if run["step_s"]:
            loss.append(f"{run['step_s']:.3g} s a step")
    found.append(", ".join(loss))
    if snapshot.goodput is not None and snapshot.goodput.goodput is not None:
        found.append(snapshot.goodput.line())
    elif run["step"]:
        found.append("goodput: being computed from all steps ...")
    where = [f"attempt {run['attempts']}"] if run["attempts"] else []
    if run["world_size"]:
        where.append(f"{counted(run['world_size'], 'rank')} on {compressed(run['hosts']) or '?'}")
    job = run["job"] or {}
    if job.get("ends_at") and run["state"] not in WAITING:
        where.append(f"job {job['id']} until {moment(job['ends_at'], snapshot.at)}")
    elif job.get("id"):
        where.append(f"job {job['id']}")
    if run["checkpoint_step"] is not None:
        where.append(f"newest checkpoint: step {run['checkpoint_step']:,}")
    return [*found, ", ".join(where)] if where else found


def _progress(run: dict[str, Any], width: int) -> str:
    """Return the line with the bar."""
    step, total = run["step"], run["total_steps"]
    if not total:
        return f"step {step:,}"
    left = f", {short_span(run['time_left_s'])} left" if run["state"] == "running" and run["time_left_s"] else ""
    text = f"step {step:,} of {total:,}"
    end = f"{min(1.0, step / total):.1%}{left}"
    room = width - len(text) - len(end) - 6
    if room < 10:
        return f"{text}, {end}"
    done = min(room, room * step // total)
    return f"{text}  [{'#' * done}{'-' * (room - done)}]  {end}"


def _problems(snapshot: Snapshot) -> list[Line]:
    before = "not readable now, this is what was read before: " if snapshot.runs else ""
    found = [(f"{before}{snapshot.problem}", RED)] if snapshot.problem else []
    if snapshot.slurm_problem and any(run.get("job") for run in snapshot.runs):
        found.append((f"Slurm does not answer: {snapshot.slurm_problem}", YELLOW))
    return found


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))
