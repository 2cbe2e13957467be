"""A run as text: its figures, why it waits or is stale, and its history."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from hpcgpt.output.counted import counted
from hpcgpt.run.goodput import Goodput
from hpcgpt.run.records import Record as Row
from hpcgpt.status.figures import figure, moment, span
from hpcgpt.status.run_state import ALIVE, SILENT_S, WAITING
from hpcgpt.status.why import compressed, title


def as_text(found: dict[str, Any], now: float) -> str:
    """Format what `run_status.complete` returned; `now` in unix seconds."""
    total = f" of {found['total_steps']:,}" if found["total_steps"] else ""
    lines = [title(found)]
    lines += [f"  {line}" for line in queue_lines(found, now)]
    lines.append(f"  step {found['step']:,}{total}, {found['tokens']:,} tokens, attempts so far: {found['attempts']}")
    if found["state"] == "imported":
        lines.append(f"  what to do: {train_on(found['run'])}")
    if job := running_job(found, now):
        lines.append(f"  {job}")
    if found["last_step_age_s"] is not None:
        ranks = counted(found["world_size"], "rank") if found["world_size"] else "? ranks"
        lines.append(
            f"  loss {figure(found['train/loss'], '.4f')}, {figure(found['train/tokens_per_s'], ',.0f')} tokens/s on "
            f"{ranks}, last step {span(found['last_step_age_s'])} ago"
        )
    if found["val/loss"] is not None:
        lines.append(
            f"  validation loss {found['val/loss']:.4f}, {figure(found['val/bits_per_byte'], '.4f')} bits per byte, "
            f"at step {found['val_step']:,}"
        )
    if found["checkpoint_step"] is not None:
        lines.append(f"  newest checkpoint: step {found['checkpoint_step']:,}")
    if found["state"] == "running" and found["time_left_s"] is not None:
        lines.append(f"  about {span(found['time_left_s'])} of training left")
    if found["state"] == "stale":
        lines += _what_to_look_at(found)
    lines += [f"  {_at(event)}: {_slow(event)}" for event in found["stragglers"]]
    if "history" in found:
        lines += [f"  {line}" for entry in found["history"] for line in _entry_lines(entry)]
        lines += [f"  {line}" for line in Goodput.from_dict(found["goodput"]).table().splitlines()]
    elif found["goodput"] and found["goodput"]["goodput"] is not None:
        lines.append(f"  {Goodput.from_dict(found['goodput']).line()}")
    return "\n".join(lines)


def train_on(folder: str) -> str:
    """Return the command that trains on from imported weights; what a user must fill in is in capitals."""
    return f"hpcgpt train {shlex.quote(f'{folder}/config.toml')} --data.dir SHARDS"


def running_job(found: dict[str, Any], now: float) -> str:
    """Describe the job of a run that should be running: its nodes, and when Slurm ends it; '' without Slurm."""
    job = found["job"]
    if found["state"] not in ALIVE or not job:
        return ""
    until = f", until {moment(job['ends_at'], now)}" if job.get("ends_at") else ""
    return f"job {job['id']} on {compressed(found['hosts']) or job.get('nodes') or '?'}{until}"


def queue_lines(found: dict[str, Any], now: float) -> list[str]:
    """Describe the job that waits in Slurm's queue for this run: why, what to do, and its expected start."""
    job = found["job"]
    if found["state"] not in WAITING or not job:
        return []
    if "state" not in job:
        return [f"job {job['id']}; Slurm did not answer: whether it still waits is unknown"]
    lines = [f"job {job['id']} waits{reason_in_words(job)}"]
    if job["action"]:
        lines.append(f"what to do: {job['action']}")
    if job["waiting_helps"] is False:
        lines.append("it will not start as it is")
    elif job["starts_at"] is not None:
        lines.append(f"expected start: {expected_start(job, now)}")
    elif job["reason"] in ("Resources", "Priority"):
        lines.append("expected start: Slurm has not computed one (yet)")
    return lines


def reason_in_words(job: dict[str, Any]) -> str:
    """Return Slurm's own word and what it means, as the end of a sentence; '' if Slurm gives no reason."""
    return f" ({job['reason']}): {job['meaning']}" if job["meaning"] else ", and Slurm gives no reason yet"


def expected_start(job: dict[str, Any], now: float) -> str:
    in_s = job["starts_at"] - now
    return f"{moment(job['starts_at'], now)}, " + (f"in {span(in_s)}" if in_s > 0 else "as soon as Slurm looks at it")


def _what_to_look_at(found: dict[str, Any]) -> list[str]:
    usual = f", where a step takes {found['step_s']:.2g} s" if found["step_s"] else ""
    lines = [f"  nothing written for {span(found['still_s'])}{usual}"]
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
    lines = [f"{name}{job}{hosts}, {began}, {span(max(0.0, entry['ended_at'] - entry['began_at']))}"]
    if entry["attempt"] is not None:
        lines += [
            f"  went back from step {e.get('from_step', 0):,} to step {e.get('step', 0):,}" for e in entry["went_back"]
        ]
        lost = f", of which {entry['lost_steps']:,} were lost" if entry["lost_steps"] else ""
        saved = ", ".join(f"{step:,}" for step in entry["checkpoints"][-3:]) or "none"
        more = f"{len(entry['checkpoints'])} in all, the newest: " if len(entry["checkpoints"]) > 3 else ""
        lines.append(f"  steps {entry['from_step']:,} to {entry['to_step']:,}{lost}; checkpoints: {more}{saved}")
        lines += [f"  {_at(e)}: not saved: {e.get('problem', '')}" for e in entry["save_failed"]]
        lines += [f"  {_at(e)}: {_slow(e)}" for e in entry["straggler"]]
        lines += [f"  {_at(e)}: {_rank(e)} hung for {span(e.get('silent_s', 0))}" for e in entry["hang"]]
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


def _rank(event: Row) -> str:
    rank = f"rank {event['rank']}" if event.get("rank") is not None else "a rank"
    return f"{rank} on {event['host']}" if event.get("host") else rank


def _slow(event: Row) -> str:
    return f"{_rank(event)} takes {event.get('factor', 0):.1f} times as long as usual, and the other ranks wait for it"
