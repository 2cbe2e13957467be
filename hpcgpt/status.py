"""``python -m hpcgpt.status RUN...``: how is it going? Read from the run folder alone, on any machine that sees it.

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcgpt import cli, generation, runfolder


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt status", description="How runs are going.")
    parser.add_argument("RUN", nargs="+", help="run folders")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    for name in options.RUN:
        found = status(Path(name), time.time())
        print(json.dumps(found) if options.json else _in_words(found))
    return 0


def status(folder: Path, now: float) -> dict[str, Any]:
    """What is known of a run; `now` in unix seconds. Figures that are not known yet are None.

    `state` is "new", "running" (its holder has not left), "finished", "saved" (it waits to run again) or
    "stopped" (a failure, or a person's doing); whether a running one is alive shows in `last_step_age_s`.

    Raises:
        ValueError: there is no run in `folder`.
    """
    run_id = runfolder.run_id(folder)
    rows = runfolder.read_rows(folder / "metrics.jsonl")
    events = runfolder.events(folder)
    starts = [event for event in events if event["event"] == "start"]
    last = rows[-1] if rows else {}
    total = starts[-1]["total_steps"] if starts else None
    evaluated: dict[str, Any] = next((row for row in reversed(rows) if "val/loss" in row), {})
    step_s = _usual_step_s(rows)
    left = total - last["step"] if rows and total else None
    return {
        "run": str(folder),
        "id": run_id,
        "state": _state(folder, events),
        "reason": _reason(events),
        "step": last.get("step", 0),
        "total_steps": total,
        "tokens": last.get("tokens", 0),
        "train/loss": last.get("train/loss"),
        "val/loss": evaluated.get("val/loss"),
        "val/bits_per_byte": evaluated.get("val/bits_per_byte"),
        "val_step": evaluated.get("step"),
        "train/tokens_per_s": last.get("train/tokens_per_s"),
        "time_left_s": left * step_s if left is not None and step_s is not None else None,
        "last_step_age_s": now - last["time"] if rows else None,
        "attempts": len(starts),
        "world_size": starts[-1]["world_size"] if starts else None,
        "checkpoint_step": max((event["step"] for event in events if event["event"] == "save"), default=None),
    }


def _state(folder: Path, events: Sequence[dict[str, Any]]) -> str:
    newest = _turn(events)
    if not newest:
        return "new"
    if newest["event"] == "start":
        return "running" if generation.is_held(folder) else "stopped"
    return {runfolder.FINISHED: "finished", runfolder.AGAIN: "saved"}.get(newest["status"], "stopped")


def _reason(events: Sequence[dict[str, Any]]) -> str:
    """Why the newest attempt ended; '' while it runs."""
    return str(_turn(events).get("reason", ""))


def _turn(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The newest start or end of an attempt; {} if there was none."""
    turns = [event for event in events if event["event"] in ("start", "end", "crash")]
    return turns[-1] if turns else {}


def _usual_step_s(rows: Sequence[dict[str, Any]]) -> float | None:
    """Median seconds of the last hundred steps."""
    recent = sorted(row["train/step_s"] for row in rows[-100:])
    return recent[len(recent) // 2] if recent else None


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
            f"{found['world_size']} ranks, last step {_ago(found['last_step_age_s'])}"
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
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    cli.run(main)
