"""The state and figures of one run, as `hpcgpt status --json` prints them; docs/reference.md lists the keys.

`complete` reads every row of metrics.jsonl, or the blocks of a long run (hpcgpt.run.blocks), and computes goodput and
the history. `brief` reads only the end of the file, whatever its size: the same keys, but `goodput` is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt.run import attempts, condensed, goodput, records, row_search, run_folder
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm.queue import Queue
from hpcgpt.status import history, run_state
from hpcgpt.status.run_state import ALIVE, State, usual_step_s

DEAD_S = 3600.0  # a stale run without a heartbeat for longer than this does not get older


def complete(
    folder: Path, now: float, queue: Queue | None = None, with_history: bool = False,
    read: tuple[Sequence[Row], Sequence[Row]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Collect the state of a run; `now` in unix seconds. Figures that are not known yet are None.

    `queue` has Slurm's answers; with None Slurm is left out. `read` are the events and the condensed rows of a caller
    that has read them; with None they are read.

    Raises:
        UserError: there is no run in `folder`.
        OSError: it cannot be read.
    """
    run_folder.run_id(folder)
    events = records.events(folder) if read is None else read[0]
    timing = condensed.timing(folder, events) if read is None else read[1]
    found, state = _figures(folder, events, records.newest_rows(folder), now, queue)
    alive, stepping = state.name in ALIVE, not state.before_ranks
    at = _latest(_last_sign_at(found, now, queue), events, timing) if alive else None
    found["attempts"] = len(attempts.starts(events, timing))
    found["goodput"] = goodput.measure(events, timing, at, stepping=stepping).as_dict()
    if with_history:
        found["history"] = history.entries(events, timing, at if stepping else None)
    return found


def brief(folder: Path, now: float, queue: Queue | None = None) -> dict[str, Any]:
    """Collect what a line of the table shows; as `complete`, without goodput."""
    return _figures(folder, records.events(folder, brief=True), records.newest_rows(folder), now, queue)[0]


def jobs(folder: Path) -> list[str]:
    """List the Slurm jobs on which the state of a run depends; [] if its folder cannot be read."""
    try:
        return run_state.jobs(records.events(folder, brief=True))
    except OSError:
        return []


def _figures(
    folder: Path, events: Sequence[Row], newest: Sequence[Row], now: float, queue: Queue | None
) -> tuple[dict[str, Any], State]:
    """Compute everything that needs only the newest rows, and the state, which they include."""
    starts = attempts.starts(events, newest)
    start = starts[-1] if starts else {}
    back = attempts.went_back_to(events)
    kept = newest if back is None else _newest_up_to(folder, back)
    last: Row = kept[-1] if kept else {}
    step = last.get("step", 0) if back is None else back
    total = start.get("total_steps")
    evaluated: Row = next((row for row in reversed(kept) if "val/loss" in row), {})
    step_s = usual_step_s(kept)
    left = max(0, total - step) if kept and total else None
    state = run_state.find(folder, events, newest, now, queue.presence if queue else None)
    alive = state.name in ALIVE
    job = queue.job(state.job) if queue and state.job else None
    found = {
        "run": str(folder),
        "id": run_folder.run_id(folder),
        "state": state.name,
        "reason": state.reason,
        "step": step,
        "total_steps": total,
        "tokens": last.get("tokens", 0),
        "train/loss": last.get("train/loss"),
        "val/loss": evaluated.get("val/loss"),
        "val/bits_per_byte": evaluated.get("val/bits_per_byte"),
        "val_step": evaluated.get("step"),
        "train/tokens_per_s": last.get("train/tokens_per_s"),
        "step_s": step_s,
        "time_left_s": left * step_s if left is not None and step_s is not None else None,
        "last_step_age_s": max(0.0, now - last["time"]) if kept else None,
        "changed_at": _changed_at(events, newest, now),
        "still_s": state.still_s,
        "heartbeat_age_s": run_state.heartbeat_age_s(folder, now) if alive else None,
        "log": _newest_log(folder),
        "attempts": len(starts),
        "world_size": start.get("world_size"),
        "hosts": list(dict.fromkeys(start.get("hosts") or [])),
        "checkpoint_step": 0 if state.name == "imported" else attempts.newest_checkpoint(events),
        "stragglers": _stragglers(events, start) if alive else [],
        "job": job.as_dict() if job else _unknown_job(state),
        "goodput": None,
    }
    return found, state


def _newest_up_to(folder: Path, step: int) -> list[Row]:
    """Read the newest rows up to a step that the run went back to: later ones are cut off when an attempt continues."""
    with suppress(FileNotFoundError), open(folder / "metrics.jsonl", "rb") as file:
        end = row_search.first_from(file, step + 1)
        return [row for row in records.newest_rows(folder, end) if row["step"] <= step]
    return []


def _unknown_job(state: State) -> dict[str, Any] | None:
    """Return the job of a state if Slurm shows nothing of it: only its id is known."""
    return {"id": state.job} if state.job else None


def _changed_at(events: Sequence[Row], newest: Sequence[Row], now: float) -> float | None:
    """Return when the run last wrote something; a time in the future, after a clock was set back, counts as now."""
    times = [record["time"] for record in (*events[-1:], *newest[-1:])]
    return min(now, max(times)) if times else None


def _last_sign_at(found: dict[str, Any], now: float, queue: Queue | None) -> float:
    """Return until when the time of a run that should be running counts: now, unless it seems to be dead.

    Where Slurm cannot be asked, as on a laptop with a copy of the folder, nothing records its end.
    """
    if found["state"] != "stale":
        return now
    beat_s, still_s = found["heartbeat_age_s"], found["still_s"]
    silent_s = still_s if beat_s is None else min(still_s, beat_s)
    job = found["job"]
    has_job = bool(queue and job and queue.presence(job["id"]) == "there")
    return now - silent_s if silent_s > DEAD_S and not has_job else now


def _latest(now: float, events: Sequence[Row], rows: Sequence[Row]) -> float:
    """Return `now`, or the newest record's time: the clock may have been set back."""
    return max([now, *(float(record["time"]) for record in (*events[-1:], *rows[-1:]))])


def _newest_log(folder: Path) -> str | None:
    with suppress(OSError):
        logs = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        return str(logs[-1]) if logs else None
    return None


def _stragglers(events: Sequence[Row], start: Row) -> list[dict[str, Any]]:
    """Return the stragglers that the newest attempt reported."""
    return [dict(e) for e in events if e["event"] == "straggler" and e.get("attempt") == start.get("attempt")]
