"""``python -m hpcgpt.status RUN...``: show how runs are going.

It reads the run folder, on any machine that sees it. If a job has written nothing for a long time, it asks Slurm
whether the job still exists (the states: hpcgpt.slurm.run_state).

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.run import attempts, goodput, run_folder
from hpcgpt.run.attempts import Attempt
from hpcgpt.run.goodput import Goodput
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm import run_state
from hpcgpt.slurm.run_state import ALIVE, NOTHING_REPORTED, SILENT_S, Presence, presence_of, usual_step_s


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt status", description="Show how runs are going.")
    parser.add_argument("RUN", nargs="+", help="run folders")
    parser.add_argument("--history", action="store_true", help="also show each attempt, and what the time was spent on")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(argv)
    for name in options.RUN:
        found = status(Path(name), time.time(), options.history, presence_of)
        print(json.dumps(found) if options.json else _as_text(found))
    return 0


def status(
    folder: Path, now: float, with_history: bool = False, ask: Callable[[str], Presence] | None = None
) -> dict[str, Any]:
    """Collect the state of a run; `now` in unix seconds. Figures that are not known yet are None.

    `ask` asks Slurm about a job (run_state.presence_of); None: Slurm is not asked.

    Raises:
        UserError: there is no run in `folder`.
    """
    run_id = run_folder.run_id(folder)
    events, rows = attempts.read(folder)
    starts = attempts.starts(events, rows)
    newest = starts[-1] if starts else {}
    last = rows[-1] if rows else {}
    total = newest.get("total_steps")
    evaluated: Row = next((row for row in reversed(rows) if "val/loss" in row), {})
    step_s = usual_step_s(rows)
    left = max(0, total - last["step"]) if rows and total else None
    state = run_state.find(folder, events, rows, now, ask)
    alive = state.name in ALIVE
    # The clock may have been set back: the newest record is not from the future.
    at = max([now, *(record["time"] for record in (*events[-1:], *rows[-1:]))]) if alive else None
    found = {
        "run": str(folder),
        "id": run_id,
        "state": state.name,
        "reason": state.reason,
        "step": last.get("step", 0),
        "total_steps": total,
        "tokens": last.get("tokens", 0),
        "train/loss": last.get("train/loss"),
        "val/loss": evaluated.get("val/loss"),
        "val/bits_per_byte": evaluated.get("val/bits_per_byte"),
        "val_step": evaluated.get("step"),
        "train/tokens_per_s": last.get("train/tokens_per_s"),
        "step_s": step_s,
        "time_left_s": left * step_s if left is not None and step_s is not None else None,
        "last_step_age_s": max(0.0, now - last["time"]) if rows else None,
        "still_s": state.still_s,
        "heartbeat_age_s": _heartbeat_age_s(folder, now) if alive else None,
        "log": _newest_log(folder),
        "attempts": len(starts),
        "world_size": newest.get("world_size"),
        "checkpoint_step": max(
            (event["step"] for event in events if event["event"] == "save" and "step" in event), default=None
        ),
        "stragglers": _stragglers(events, newest) if alive else [],
        "goodput": goodput.measure(events, rows, at, stepping=state.name != "starting").as_dict(),
    }
    if with_history:
        found["history"] = _history(events, rows, at if state.name != "starting" else None)
    return found


def _heartbeat_age_s(folder: Path, now: float) -> float | None:
    """Return the seconds since rank 0's last heartbeat, by the clock of the file system."""
    beats = sorted((folder / "generations").glob("[0-9]*.alive"))
    with suppress(OSError):
        return max(0.0, now - beats[-1].stat().st_mtime) if beats else None
    return None


def _newest_log(folder: Path) -> str | None:
    with suppress(OSError):
        logs = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        return str(logs[-1]) if logs else None
    return None


def _stragglers(events: Sequence[Row], start: Row) -> list[dict[str, Any]]:
    """Return the stragglers that the newest attempt reported."""
    return [dict(e) for e in events if e["event"] == "straggler" and e.get("attempt") == start.get("attempt")]


# --- history ---------------------------------------------------------------------------------------


def _history(events: Sequence[Row], rows: Sequence[Row], now: float | None) -> list[dict[str, Any]]:
    """Make an entry for each attempt, and one (attempt None) for each crash of a job whose ranks did not start."""
    found = attempts.attempts(events, rows, now)
    entries = [_entry(attempt, events) for attempt in found]
    covered = {attempt.crash["time"] for attempt in found if attempt.crash}
    for crash in events:
        if crash["event"] == "crash" and crash["time"] not in covered:
            job = _newest("job", crash.get("job"), events)
            entries.append({
                "attempt": None, "job": crash.get("job", ""), "hosts": job.get("hosts", []),
                "began_at": job.get("started_at", crash["time"]), "ended_at": crash["time"],
                "reason": crash.get("reason", ""), "crash": dict(crash), "requeue": _requeue(crash.get("job"), events),
            })  # fmt: skip
    return sorted(entries, key=lambda entry: float(entry["began_at"]))


def _entry(attempt: Attempt, events: Sequence[Row]) -> dict[str, Any]:
    def reported(name: str) -> list[dict[str, Any]]:
        return [dict(event) for event in attempt.events if event["event"] == name]

    return {
        "attempt": attempt.number,
        "job": attempt.job,
        "hosts": list(attempt.hosts),
        "world_size": attempt.world_size,
        "began_at": attempt.began_at,
        "ended_at": attempt.ended_at,
        "from_step": attempt.from_step,
        "to_step": attempt.to_step,
        "lost_steps": attempt.lost_steps,
        "checkpoints": [event["step"] for event in reported("save") if "step" in event],
        "save_failed": reported("save_failed"),
        "stop": reported("stop"),
        "straggler": reported("straggler"),
        "hang": reported("hang"),
        "reason": attempt.reason or ("" if attempt.running else NOTHING_REPORTED),
        "crash": dict(attempt.crash) or None,
        "requeue": _requeue(attempt.job, events) if not attempt.running else "",
    }


def _newest(name: str, job: str | None, events: Sequence[Row]) -> Row:
    return next((e for e in reversed(events) if e["event"] == name and job and e.get("job") == job), {})


def _requeue(job: str | None, events: Sequence[Row]) -> str:
    """Return why the batch script requeued this start of the job; '' if it did not."""
    return str((_newest("requeue", job, events) or _newest("chain", job, events)).get("reason", ""))


# --- as text ---------------------------------------------------------------------------------------


def _as_text(found: dict[str, Any]) -> str:
    total = f" of {found['total_steps']:,}" if found["total_steps"] else ""
    reason = f" ({found['reason']})" if found["reason"] else ""
    lines = [
        f"{found['run']}: {found['state']}{reason}",
        f"  step {found['step']:,}{total}, {found['tokens']:,} tokens, attempts so far: {found['attempts']}",
    ]
    if found["last_step_age_s"] is not None:
        lines.append(
            f"  loss {_figure(found['train/loss'], '.4f')}, {_figure(found['train/tokens_per_s'], ',.0f')} tokens/s on "
            f"{found['world_size'] or '?'} ranks, last step {_span(found['last_step_age_s'])} ago"
        )
    if found["val/loss"] is not None:
        lines.append(
            f"  validation loss {found['val/loss']:.4f}, {_figure(found['val/bits_per_byte'], '.4f')} bits per byte, "
            f"at step {found['val_step']:,}"
        )
    if found["checkpoint_step"] is not None:
        lines.append(f"  newest checkpoint: step {found['checkpoint_step']:,}")
    if found["state"] == "running" and found["time_left_s"] is not None:
        lines.append(f"  about {_span(found['time_left_s'])} of training left")
    if found["state"] == "silent":
        lines += _what_to_look_at(found)
    lines += [f"  {_at(event)}: {_slow(event)}" for event in found["stragglers"]]
    if "history" in found:
        lines += [f"  {line}" for entry in found["history"] for line in _entry_lines(entry)]
        lines += [f"  {line}" for line in Goodput.from_dict(found["goodput"]).table().splitlines()]
    elif found["goodput"]["goodput"] is not None:
        lines.append(f"  {Goodput.from_dict(found['goodput']).line()}")
    return "\n".join(lines)


def _what_to_look_at(found: dict[str, Any]) -> list[str]:
    usual = f", where a step takes {found['step_s']:.2g} s" if found["step_s"] else ""
    lines = [f"  nothing written for {_span(found['still_s'])}{usual}"]
    beat_s = found["heartbeat_age_s"]
    if beat_s is not None and beat_s < SILENT_S:
        lines.append("  rank 0 is alive: it waits for a rank, a disk or the network, or is still compiling")
    else:
        lines.append("  rank 0's heartbeat has stopped, too: its process or its node is gone; see `squeue --me`")
    paths = [found["log"] or f"{found['run']}/logs", f"{found['run']}/faults"]
    existing = [path for path in paths if Path(path).exists()]
    return [*lines, f"  look at {' and '.join(existing)}"] if existing else lines


def _entry_lines(entry: dict[str, Any]) -> list[str]:
    name = f"attempt {entry['attempt']}" if entry["attempt"] is not None else "no attempt"
    job = f", job {entry['job']}" if entry["job"] else ""
    hosts = f", on {', '.join(entry['hosts'])}" if any(entry["hosts"]) else ""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["began_at"]))
    lines = [f"{name}{job}{hosts}, {began}, {_span(max(0.0, entry['ended_at'] - entry['began_at']))}"]
    if entry["attempt"] is not None:
        lost = f", of which {entry['lost_steps']:,} were lost" if entry["lost_steps"] else ""
        saved = ", ".join(f"{step:,}" for step in entry["checkpoints"][-3:]) or "none"
        more = f"{len(entry['checkpoints'])} in all, the newest: " if len(entry["checkpoints"]) > 3 else ""
        lines.append(f"  steps {entry['from_step']:,} to {entry['to_step']:,}{lost}; checkpoints: {more}{saved}")
        lines += [f"  {_at(e)}: not saved: {e.get('problem', '')}" for e in entry["save_failed"]]
        lines += [f"  {_at(e)}: {_slow(e)}" for e in entry["straggler"]]
        lines += [f"  {_at(e)}: {_rank(e)} hung for {_span(e.get('silent_s', 0))}" for e in entry["hang"]]
        lines += [f"  {_at(e)}: asked to stop: {e.get('reason', '')}" for e in entry["stop"]]
    if entry["reason"]:
        lines.append(f"  ended: {entry['reason']}")
    crash = entry["crash"] or {}
    if crash.get("rank") is not None or crash.get("host"):
        lines.append(f"  first to fail: {_rank(crash)}")
    if crash.get("excluded"):
        lines.append(f"  excluded from later starts: {', '.join(crash['excluded'])}")
    if entry["requeue"] and entry["requeue"] != entry["reason"]:
        lines.append(f"  started again: {entry['requeue']}")
    return lines


def _at(event: Row) -> str:
    return f"step {event['step']:,}" if "step" in event else "at some step"


def _figure(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def _rank(event: Row) -> str:
    rank = f"rank {event['rank']}" if event.get("rank") is not None else "a rank"
    return f"{rank} on {event['host']}" if event.get("host") else rank


def _slow(event: Row) -> str:
    return f"{_rank(event)} takes {event.get('factor', 0):.1f} times as long as usual, and the other ranks wait for it"


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    cli.run(main)
