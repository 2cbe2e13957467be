"""The attempts of a run, one entry each: when and where it ran, what it gained, how it ended, and what followed.

What followed an attempt is read from the events of its job's start, in which the requeue policy records its decision
(hpcgpt.requeue). After a preemption or a node failure Slurm starts the job again without asking: then there is no
decision, but a later start of the same job.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcgpt.run import attempts
from hpcgpt.run.attempts import Attempt
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm.queue import id_of
from hpcgpt.status.run_state import NOTHING_REPORTED

REQUEUED, CHAINED, SLURM_REQUEUED = "requeued", "queued as job", "requeued by Slurm itself"
GAVE_UP, LEFT, UNDECIDED = "given up", "not requeued", ""


def entries(events: Sequence[Row], rows: Sequence[Row], now: float | None) -> list[dict[str, Any]]:
    """Make an entry for each attempt, and one (attempt None) for each crash of a job whose ranks did not start."""
    found = attempts.attempts(events, rows, now)
    before = [0, *(attempt.number for attempt in found)]
    made = [_entry(attempt, events, number) for attempt, number in zip(found, before, strict=False)]
    covered = {attempt.crash["time"] for attempt in found if attempt.crash}
    for crash in events:
        if crash["event"] == "crash" and crash["time"] not in covered:
            job = _newest("job", crash.get("job"), events)
            decision, why = _decision(crash.get("job"), events)
            made.append({
                "attempt": None, "job": crash.get("job", ""), "hosts": job.get("hosts", []),
                "began_at": job.get("started_at", crash["time"]), "ended_at": crash["time"], "gained_steps": 0,
                "reason": crash.get("reason", ""), "crash": dict(crash), "requeue": _requeue(crash.get("job"), events),
                "decision": decision, "decision_reason": why,
            })  # fmt: skip
    return sorted(made, key=lambda entry: float(entry["began_at"]))


def _entry(attempt: Attempt, events: Sequence[Row], before: int) -> dict[str, Any]:
    """Make the entry of an attempt; `before` is the number of the one before it, 0 for the first."""

    def reported(name: str) -> list[dict[str, Any]]:
        return [dict(event) for event in attempt.events if event["event"] == name]

    decision, why = (UNDECIDED, "") if attempt.running else _decision(attempt.job, events)
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
        "gained_steps": max(0, attempt.kept_step - attempt.from_step),
        "running": attempt.running,
        "checkpoints": [event["step"] for event in reported("save") if "step" in event],
        "save_failed": reported("save_failed"),
        # By this attempt, or by `hpcgpt checkpoint back`, which takes a number of its own.
        "went_back": [
            dict(event)
            for event in events
            if event["event"] == "went_back" and before < event.get("attempt", 0) <= attempt.number
        ],
        "stop": reported("stop"),
        "straggler": reported("straggler"),
        "hang": reported("hang"),
        "reason": attempt.reason or ("" if attempt.running else NOTHING_REPORTED),
        "crash": dict(attempt.crash) or None,
        "requeue": _requeue(attempt.job, events) if not attempt.running else "",
        "decision": decision,
        "decision_reason": why,
    }


def _newest(name: str, job: str | None, events: Sequence[Row]) -> Row:
    return next((e for e in reversed(events) if e["event"] == name and job and e.get("job") == job), {})


def _requeue(job: str | None, events: Sequence[Row]) -> str:
    """Return why the batch script requeued this start of the job; '' if it did not."""
    return str((_newest("requeue", job, events) or _newest("chain", job, events)).get("reason", ""))


def _decision(job: str | None, events: Sequence[Row]) -> tuple[str, str]:
    """Return what was decided after this start of a job, and why; '' if nothing is on record."""
    if not job:
        return UNDECIDED, ""
    for name, decision in (("requeue", REQUEUED), ("chain", CHAINED), ("give_up", GAVE_UP), ("no_requeue", LEFT)):
        if event := _newest(name, job, events):
            next_job = f" {event.get('next_job', '')}" if name == "chain" else ""
            return f"{decision}{next_job}", str(event.get("reason", ""))
    if any(
        event["event"] == "job" and id_of(event.get("job", "")) == id_of(job) and event["job"] != job
        for event in _after(job, events)
    ):
        return SLURM_REQUEUED, ""
    return UNDECIDED, ""


def _after(job: str, events: Sequence[Row]) -> Sequence[Row]:
    """Return the events after the last one of this start of a job."""
    for index in range(len(events) - 1, -1, -1):
        if events[index].get("job") == job:
            return events[index + 1 :]
    return ()
