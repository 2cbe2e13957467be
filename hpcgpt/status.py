"""``python -m hpcgpt.status RUN...``: how is it going? Read from the run folder alone, on any machine that sees it.

The state of a run is one of

    new        nothing has started yet
    starting   its job has started, its ranks have not said so yet
    running    it has given a sign of life lately
    silent     it should be running, but has been still for much longer than a step or an evaluation takes
    finished   all steps are done
    saved      it saved before the end and left; it goes on when it is started again
    queued     the same, or it crashed, and the batch script has asked Slurm to start it again
    stopped    a failure, or a person's doing

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt import cli, generation, goodput, history, runfolder
from hpcgpt.goodput import Goodput
from hpcgpt.history import Attempt, Row

ALIVE = ("starting", "running", "silent")
# How long a run may be still: at the very least, and before its first step, in which a model may be compiled.
SILENT_S, SILENT_AT_START_S = 120.0, 600.0
NO_WORD = "no word: killed, or its node failed"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt status", description="How runs are going.")
    parser.add_argument("RUN", nargs="+", help="run folders")
    parser.add_argument("--history", action="store_true", help="also attempt by attempt, and where the time went")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    for name in options.RUN:
        found = status(Path(name), time.time(), options.history)
        print(json.dumps(found) if options.json else _in_words(found))
    return 0


def status(folder: Path, now: float, with_history: bool = False) -> dict[str, Any]:
    """What is known of a run; `now` in unix seconds. Figures that are not known yet are None.

    Raises:
        UserError: there is no run in `folder`.
    """
    run_id = runfolder.run_id(folder)
    events, rows = history.read(folder)
    starts = [event for event in events if event["event"] == "start"]
    last = rows[-1] if rows else {}
    total = starts[-1].get("total_steps") if starts else None
    evaluated: Row = next((row for row in reversed(rows) if "val/loss" in row), {})
    step_s = _usual_step_s(rows)
    left = total - last["step"] if rows and total else None
    still_s = now - _last_sign_at(events, rows, now)
    state = _state(folder, events, rows, still_s)
    alive = state in ALIVE
    found = {
        "run": str(folder),
        "id": run_id,
        "state": state,
        "reason": _reason(folder, events, state),
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
        "last_step_age_s": now - last["time"] if rows else None,
        "still_s": still_s if alive else None,
        "heartbeat_age_s": _heartbeat_age_s(folder, now) if alive else None,
        "log": _newest_log(folder),
        "attempts": len(starts),
        "world_size": starts[-1].get("world_size") if starts else None,
        "checkpoint_step": max((event["step"] for event in events if event["event"] == "save"), default=None),
        "stragglers": _stragglers(events) if alive else [],
        "goodput": goodput.measure(events, rows, now if alive else None).as_dict(),
    }
    if with_history:
        found["history"] = _history(events, rows, now if alive else None)
    return found


# --- its state -------------------------------------------------------------------------------------

_TURNS = ("job", "start", "end", "crash", "requeue", "chain")


def _turn(events: Sequence[Row], names: Sequence[str] = _TURNS) -> Row:
    """The newest event of these names; {} if there was none."""
    turns = [event for event in events if event["event"] in names]
    return turns[-1] if turns else {}


def _state(folder: Path, events: Sequence[Row], rows: Sequence[Row], still_s: float) -> str:
    newest = _turn(events)
    name = newest.get("event")
    if name is None:
        return "new"
    if name in ("requeue", "chain"):
        return "queued"
    if name == "end":
        return {runfolder.FINISHED: "finished", runfolder.AGAIN: "saved"}.get(int(newest["status"]), "stopped")
    if name == "crash" or (name == "start" and (not generation.is_held(folder) or _holder_is_gone(folder))):
        return "stopped"
    if still_s > _silent_after_s(events, rows):
        return "silent"
    return "starting" if name == "job" else "running"


def _reason(folder: Path, events: Sequence[Row], state: str) -> str:
    """Why the newest attempt ended; '' while it runs."""
    if state in ALIVE:
        return ""
    newest = _turn(events, ("start", "end", "crash"))
    if newest.get("event") != "start":
        return str(newest.get("reason", ""))
    # An error that is a sentence is written there last, by the one who held the folder.
    ended = runfolder.read_exit(folder)
    if ended and (folder / "exit.json").stat().st_mtime >= newest["time"]:
        return ended.reason
    return NO_WORD


def _last_sign_at(events: Sequence[Row], rows: Sequence[Row], now: float) -> float:
    signs = [float(event["time"]) for event in events]
    signs += [float(row["time"]) + history.evaluation_s(row) for row in rows[-1:]]
    return max(signs, default=now)


def _silent_after_s(events: Sequence[Row], rows: Sequence[Row]) -> float:
    step_s = _usual_step_s(rows)
    newest = _turn(events, ("start", "job"))
    # The newest row of a run that goes on may be of a step before.
    stepped = bool(rows) and rows[-1]["time"] > newest.get("time", 0.0)
    evaluation_s = max((history.evaluation_s(row) for row in rows), default=0.0)
    return max(SILENT_S, 20 * (step_s or 0.0), 2 * evaluation_s, 0.0 if stepped else SILENT_AT_START_S)


def _holder_is_gone(folder: Path) -> bool:
    """Was the newest attempt's rank 0 on this very host, and is there no such process any more?"""
    taken = sorted((folder / "generations").glob("[0-9]*.json"))
    with suppress(OSError, ValueError, IndexError, KeyError):
        holder = json.loads(taken[-1].read_bytes())
        if holder["host"] == socket.gethostname():
            try:
                os.kill(int(holder["pid"]), 0)
            except ProcessLookupError:
                return True
    return False


def _heartbeat_age_s(folder: Path, now: float) -> float | None:
    """Seconds since rank 0 last said that it lives, by the clock of the file system."""
    beats = sorted((folder / "generations").glob("[0-9]*.alive"))
    with suppress(OSError):
        return max(0.0, now - beats[-1].stat().st_mtime) if beats else None
    return None


def _newest_log(folder: Path) -> str | None:
    with suppress(OSError):
        logs = sorted((folder / "logs").glob("*.log"), key=lambda path: path.stat().st_mtime)
        return str(logs[-1]) if logs else None
    return None


def _usual_step_s(rows: Sequence[Row]) -> float | None:
    """Median seconds of the last hundred steps."""
    recent = sorted(row["train/step_s"] for row in rows[-100:] if "train/step_s" in row)
    return recent[len(recent) // 2] if recent else None


def _stragglers(events: Sequence[Row]) -> list[dict[str, Any]]:
    """Those that the newest attempt has named."""
    attempt = _turn(events, ("start",)).get("attempt")
    return [dict(e) for e in events if e["event"] == "straggler" and e.get("attempt") == attempt]


# --- its history -----------------------------------------------------------------------------------


def _history(events: Sequence[Row], rows: Sequence[Row], now: float | None) -> list[dict[str, Any]]:
    """One entry an attempt, and one (attempt None) for each crash of a job whose ranks never began."""
    attempts = history.attempts(events, rows, now)
    entries = [_entry(attempt, events) for attempt in attempts]
    told = {attempt.crash["time"] for attempt in attempts if attempt.crash}
    for crash in events:
        if crash["event"] == "crash" and crash["time"] not in told:
            job = _turn([e for e in events if e.get("job") == crash.get("job")], ("job",))
            entries.append({
                "attempt": None, "job": crash.get("job", ""), "hosts": job.get("hosts", []),
                "began_at": job.get("started_at", crash["time"]), "ended_at": crash["time"],
                "reason": crash.get("reason", ""), "crash": dict(crash), "requeue": _requeue(crash.get("job"), events),
            })  # fmt: skip
    return sorted(entries, key=lambda entry: float(entry["began_at"]))


def _entry(attempt: Attempt, events: Sequence[Row]) -> dict[str, Any]:
    def told(name: str) -> list[dict[str, Any]]:
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
        "checkpoints": [event["step"] for event in told("save")],
        "save_failed": told("save_failed"),
        "stop": told("stop"),
        "straggler": told("straggler"),
        "hang": told("hang"),
        "reason": attempt.reason or ("" if attempt.running else NO_WORD),
        "crash": dict(attempt.crash) or None,
        "requeue": _requeue(attempt.job, events) if not attempt.running else "",
    }


def _requeue(job: str | None, events: Sequence[Row]) -> str:
    """Why the batch script had this start of the job started again; '' if it had not."""
    return str(_turn([e for e in events if job and e.get("job") == job], ("requeue", "chain")).get("reason", ""))


# --- in words --------------------------------------------------------------------------------------


def _in_words(found: dict[str, Any]) -> str:
    total = f" of {found['total_steps']:,}" if found["total_steps"] else ""
    reason = f" ({found['reason']})" if found["reason"] else ""
    lines = [
        f"{found['run']}: {found['state']}{reason}",
        f"  step {found['step']:,}{total}, {found['tokens']:,} tokens, attempts so far: {found['attempts']}",
    ]
    if found["train/loss"] is not None:
        lines.append(
            f"  loss {found['train/loss']:.4f}, {found['train/tokens_per_s']:,.0f} tokens/s on "
            f"{found['world_size']} ranks, last step {_span(found['last_step_age_s'])} ago"
        )
    if found["val/loss"] is not None:
        lines.append(
            f"  validation loss {found['val/loss']:.4f}, {found['val/bits_per_byte']:.4f} bits per byte, at step "
            f"{found['val_step']:,}"
        )
    if found["checkpoint_step"] is not None:
        lines.append(f"  newest checkpoint: step {found['checkpoint_step']:,}")
    if found["state"] == "running" and found["time_left_s"] is not None:
        lines.append(f"  about {_span(found['time_left_s'])} of training left")
    if found["state"] == "silent":
        lines += _what_to_look_at(found)
    lines += [f"  step {event['step']:,}: {_slow(event)}" for event in found["stragglers"]]
    if "history" in found:
        lines += [f"  {line}" for entry in found["history"] for line in _entry_in_words(entry)]
        lines += [f"  {line}" for line in Goodput.of(found["goodput"]).words().splitlines()]
    elif found["goodput"]["goodput"] is not None:
        lines.append(f"  {Goodput.of(found['goodput']).line()}")
    return "\n".join(lines)


def _what_to_look_at(found: dict[str, Any]) -> list[str]:
    usual = f", where a step takes {found['step_s']:.2g} s" if found["step_s"] else ""
    lines = [f"  no sign of life for {_span(found['still_s'])}{usual}"]
    beat_s = found["heartbeat_age_s"]
    if beat_s is not None and beat_s < SILENT_S:
        lines.append("  rank 0's process lives: it waits for a rank, a disk or the network, or is still compiling")
    else:
        lines.append("  rank 0's heartbeat has stopped, too: its process or its node is gone; ask `squeue --me`")
    places = [found["log"] or f"{found['run']}/logs", f"{found['run']}/faults"]
    return [*lines, f"  look at {' and '.join(place for place in places if Path(place).exists())}"]


def _entry_in_words(entry: dict[str, Any]) -> list[str]:
    name = f"attempt {entry['attempt']}" if entry["attempt"] is not None else "no attempt"
    job = f", job {entry['job']}" if entry["job"] else ""
    hosts = f", on {', '.join(entry['hosts'])}" if any(entry["hosts"]) else ""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["began_at"]))
    lines = [f"{name}{job}{hosts}, {began}, {_span(max(0.0, entry['ended_at'] - entry['began_at']))}"]
    if entry["attempt"] is not None:
        lost = f", of which {entry['lost_steps']:,} were done in vain" if entry["lost_steps"] else ""
        saved = ", ".join(f"{step:,}" for step in entry["checkpoints"][-3:]) or "none"
        more = f"{len(entry['checkpoints'])} in all, the last ones: " if len(entry["checkpoints"]) > 3 else ""
        lines.append(f"  steps {entry['from_step']:,} to {entry['to_step']:,}{lost}; checkpoints: {more}{saved}")
        lines += [f"  step {e['step']:,}: not saved: {e.get('problem', '')}" for e in entry["save_failed"]]
        lines += [f"  step {e['step']:,}: {_slow(e)}" for e in entry["straggler"]]
        lines += [
            f"  step {e.get('step', 0):,}: {_rank(e)} hung for {_span(e.get('silent_s', 0))}" for e in entry["hang"]
        ]
        lines += [f"  step {e['step']:,}: told to stop: {e.get('reason', '')}" for e in entry["stop"]]
    if entry["reason"]:
        lines.append(f"  ended: {entry['reason']}")
    crash = entry["crash"] or {}
    if crash.get("rank") is not None or crash.get("host"):
        lines.append(f"  to blame: {_rank(crash)}")
    if crash.get("excluded"):
        lines.append(f"  not used again: {', '.join(crash['excluded'])}")
    if entry["requeue"] and entry["requeue"] != entry["reason"]:
        lines.append(f"  started again: {entry['requeue']}")
    return lines


def _rank(event: Row) -> str:
    rank = f"rank {event['rank']}" if event.get("rank") is not None else "a rank"
    return f"{rank} on {event['host']}" if event.get("host") else rank


def _slow(event: Row) -> str:
    return f"{_rank(event)} takes {event.get('factor', 0):.1f} times as long as usual, and all wait for it"


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    cli.run(main)
