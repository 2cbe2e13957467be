"""The attempts of a run, one entry each: when and where it ran, what it gained, how it ended, and what followed.

What followed an attempt is read from the events of its job's start, in which the requeue policy records its decision
(hpcgpt.requeue). After a preemption or a node failure Slurm starts the job again without asking: then there is no
decision, but a later start of the same job.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from hpcgpt.run import attempts
from hpcgpt.run.attempts import Attempt
from hpcgpt.run.records import Record as Row
from hpcgpt.slurm.queue import id_of
from hpcgpt.status.run_state import NOTHING_REPORTED

REQUEUED, CHAINED, SLURM_REQUEUED = "requeued", "queued as job", "requeued by Slurm itself"
GAVE_UP, LEFT, UNDECIDED = "given up", "not requeued", ""


class _Decisions:
    """The newest event of each kind of each start of a job, and which starts followed it."""

    def __init__(self, events: Sequence[Row]) -> None:
        self._newest: dict[tuple[str, str], Row] = {}
        self._position: dict[str, int] = {}  # of the last event of a start
        self._starts: dict[str, list[tuple[int, str]]] = defaultdict(list)  # of a job: position and name of each
        for position, event in enumerate(events):
            job = event.get("job")
            if not job:
                continue
            self._newest[event["event"], job] = event
            self._position[job] = position
            if event["event"] == "job":
                self._starts[id_of(job)].append((position, job))

    def newest(self, name: str, job: str | None) -> Row:
        return self._newest.get((name, job), {}) if job else {}

    def requeue(self, job: str | None) -> str:
        """Return why the batch script requeued this start of the job; '' if it did not."""
        return str((self.newest("requeue", job) or self.newest("chain", job)).get("reason", ""))

    def after(self, job: str | None) -> tuple[str, str]:
        """Return what was decided after this start of a job, and why; '' if nothing is on record."""
        if not job:
            return UNDECIDED, ""
        for name, decision in (("requeue", REQUEUED), ("chain", CHAINED), ("give_up", GAVE_UP), ("no_requeue", LEFT)):
            if event := self.newest(name, job):
                next_job = f" {event.get('next_job', '')}" if name == "chain" else ""
                return f"{decision}{next_job}", str(event.get("reason", ""))
        last = self._position.get(job, sys.maxsize)
        if any(position > last and start != job for position, start in self._starts[id_of(job)]):
            return SLURM_REQUEUED, ""
        return UNDECIDED, ""


def entries(events: Sequence[Row], rows: Sequence[Row], now: float | None) -> list[dict[str, Any]]:
    """Make an entry for each attempt, and one (attempt None) for each crash of a job whose ranks did not start."""
    found = attempts.attempts(events, rows, now)
    decisions = _Decisions(events)
    back = [event for event in events if event["event"] == "went_back"]
    before = [0, *(attempt.number for attempt in found)]
    made = [_entry(attempt, decisions, back, number) for attempt, number in zip(found, before, strict=False)]
    covered = {attempt.crash["time"] for attempt in found if attempt.crash}
    for crash in events:
        if crash["event"] == "crash" and crash["time"] not in covered:
            job = decisions.newest("job", crash.get("job"))
            decision, why = decisions.after(crash.get("job"))
            made.append({
                "attempt": None, "job": crash.get("job", ""), "hosts": job.get("hosts", []),
                "began_at": job.get("started_at", crash["time"]), "ended_at": crash["time"], "gained_steps": 0,
                "reason": crash.get("reason", ""), "crash": dict(crash),
                "requeue": decisions.requeue(crash.get("job")), "decision": decision, "decision_reason": why,
            })  # fmt: skip
    return sorted(made, key=lambda entry: float(entry["began_at"]))


def _entry(attempt: Attempt, decisions: _Decisions, back: Sequence[Row], before: int) -> dict[str, Any]:
    """Make the entry of an attempt; `before` is the number of the one before it, 0 for the first."""

    def reported(name: str) -> list[dict[str, Any]]:
        return [dict(event) for event in attempt.events if event["event"] == name]

    decision, why = (UNDECIDED, "") if attempt.running else decisions.after(attempt.job)
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
        "went_back": [dict(event) for event in back if before < event.get("attempt", 0) <= attempt.number],
        "stop": reported("stop"),
        "straggler": reported("straggler"),
        "hang": reported("hang"),
        "reason": attempt.reason or ("" if attempt.running else NOTHING_REPORTED),
        "crash": dict(attempt.crash) or None,
        "requeue": decisions.requeue(attempt.job) if not attempt.running else "",
        "decision": decision,
        "decision_reason": why,
    }
