"""What Slurm's queue shows of jobs, for `hpcgpt status`: one squeue for many jobs, at most one every EVERY_S.

    squeue --all --noheader --array --states=all --jobs=7,8,7 --format=%i|%T|%S|%e|%N|%r squeue(1), Slurm 22.05 to 25.11

For a single job that is gone squeue ends with an error, of two it omits one; so one is named twice. An answer without
a job means that it is gone, and no answer means nothing. SLURM_TIME_FORMAT (hpcgpt.slurm.scontrol) gives unix seconds.

No torch in here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from subprocess import CompletedProcess
from typing import Any, Literal

from hpcgpt.slurm import pending_reasons, scontrol

EVERY_S = 30.0
SCRIPT = "pretrain.sbatch"
MOST_JOBS = 1000  # of one question; a command line has room for more
_FORMAT = "%i|%T|%S|%e|%N|%r"
# The states of a job that has ended (squeue(1), "job state codes").
OVER = {
    *("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "REVOKED"),
}
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT"}

Presence = Literal["pending", "held", "there", "gone", "unknown"]


@dataclass(frozen=True)
class QueuedJob:
    """A job in Slurm's queue. Times in unix seconds: `starts_at` is the start, of a pending job the expected one.

    `reason` is Slurm's own word; `nodes` its list, such as ``n[1-4]``. None and "": Slurm shows nothing.
    """

    id: str
    state: str
    reason: str = ""
    starts_at: float | None = None
    ends_at: float | None = None
    nodes: str = ""

    @property
    def presence(self) -> Presence:
        if self.state in OVER:
            return "gone"
        if self.state not in _WAITING:
            return "there"
        return "held" if pending_reasons.is_held(self.state, self.reason) else "pending"

    def as_dict(self) -> dict[str, Any]:
        """Return what `hpcgpt status --json` shows of it."""
        pending = self.presence in ("pending", "held")
        why = pending_reasons.explain(self.reason, self.id) if pending else None
        return {
            "id": self.id,
            "state": self.state,
            "reason": self.reason if pending else "",
            "meaning": why.meaning if why else "",
            "action": why.action if why else "",
            "waiting_helps": why.waiting_helps if why else None,
            "starts_at": self.starts_at,
            "ends_at": self.ends_at if not pending else None,
            "nodes": self.nodes,
        }


def id_of(job: str) -> str:
    """Return Slurm's id of a job or a start of it: '7_1' -> '7', '7' -> '7', '7_3_1' (array) -> '7_3'.

    Starts are named <job>_<restart> in the run folder, and always have the restart count.
    """
    id_, _, restart = job.rpartition("_")
    return id_ if id_ and restart.isdecimal() else job


class Queue:
    """Answers about jobs. `load` asks Slurm about all of them at once; the other methods use what is known by then."""

    def __init__(
        self,
        run: Callable[..., CompletedProcess[str]] = scontrol.run,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._clock = run, clock
        self._lock = threading.Lock()
        self._found: dict[str, QueuedJob | None] = {}  # None: gone
        self._asked_at: float | None = None
        self.problem = ""  # why Slurm did not answer the last time

    def load(self, ids: Iterable[str]) -> None:
        """Ask Slurm about these jobs, all at once, unless it was asked less than EVERY_S ago, about whatever jobs."""
        wanted = [id_ for id_ in dict.fromkeys(ids) if id_.replace("_", "").isdecimal()][:MOST_JOBS]
        with self._lock:
            if not wanted or (self._asked_at is not None and self._clock() - self._asked_at < EVERY_S):
                return
            self._asked_at = self._clock()
        done = self._run(
            "squeue", "--all", "--noheader", "--array", "--states=all", f"--jobs={','.join([*wanted, wanted[0]])}",
            f"--format={_FORMAT}",
        )  # fmt: skip
        with self._lock:
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                self.problem = lines[-1] if lines else f"squeue ended with status {done.returncode}"
                return
            self.problem = ""
            answer = parse(done.stdout)
            self._found |= {id_: answer.get(id_) or _task_of(id_, answer) for id_ in wanted}

    def job(self, id_: str) -> QueuedJob | None:
        """Return a job that was loaded and is in Slurm's queue, or has just left it; else None."""
        with self._lock:
            return self._found.get(id_)

    def presence(self, id_: str) -> Presence:
        """Is a job ('7'), or a task of an array ('12_3'), pending, held, there or gone?

        Without Slurm, or if it did not answer, or was not asked about it, the result is "unknown".
        """
        with self._lock:
            if id_ not in self._found:
                return "unknown"
            found = self._found[id_]
        return found.presence if found else "gone"


def without_run(
    known: Collection[str], run: Callable[..., CompletedProcess[str]] = scontrol.run
) -> list[tuple[QueuedJob, str]]:
    """List this user's waiting jobs of slurm/pretrain.sbatch that are not `known`, each with its command.

    A job that was queued with sbatch leaves nothing in a run folder before its first start.
    """
    done = run("squeue", "--me", "--all", "--noheader", "--array", f"--format={_FORMAT}|%o")
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        *fields, command = line.split("|", 6)
        script, *arguments = command.split() or [""]
        jobs = parse("|".join(fields)).values() if script.endswith(SCRIPT) else ()
        waiting = [job for job in jobs if job.presence in ("pending", "held") and job.id not in known]
        found += [(job, " ".join([SCRIPT, *arguments])) for job in waiting]
    return found


def _task_of(id_: str, answer: Mapping[str, QueuedJob]) -> QueuedJob | None:
    """Return the job of an array's only task, which squeue shows as '7_3' where '7' was asked for."""
    tasks = [job for shown, job in answer.items() if shown.startswith(f"{id_}_")]
    return tasks[0] if len(tasks) == 1 else None


def parse(output: str) -> Mapping[str, QueuedJob]:
    """Parse the lines of squeue in this module's format, by job id; a line of another form is left out."""
    found = {}
    for line in output.splitlines():
        parts = line.split("|", 5)
        if len(parts) == 6:
            id_, state, start, end, nodes, reason = (part.strip() for part in parts)
            found[id_] = QueuedJob(
                id_, state, reason, scontrol.unix_time(start), scontrol.unix_time(end), nodes if nodes != "N/A" else ""
            )
    return found
