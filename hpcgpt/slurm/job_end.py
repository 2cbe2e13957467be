"""The job's end time, asked of Slurm while the job runs.

SLURM_JOB_END_TIME is the end as planned when the batch script began. It may change: a user or an administrator changes
the time limit (``scontrol update TimeLimit=``), and a job that was suspended ends later. So a thread of rank 0 asks
Slurm:

    at the start                   if the environment does not contain the job's end
    every EVERY_S                  one question about one job is little work for slurmctld
    BEFORE_S before the run stops  once for each end time: the job may have been given more time at the last moment

An answer counts only while the job is RUNNING: while Slurm is ending the job, it shows that moment as the end. No
answer, or an unreadable one, changes nothing. A question takes at most 20 s (hpcgpt.slurm.scontrol).

No torch in here.
"""

from __future__ import annotations

import math
import threading
import time

from hpcgpt.distributed.stop_signals import StopFlag, shielded
from hpcgpt.output import streams
from hpcgpt.output.best_effort import only_informs
from hpcgpt.slurm import scontrol

EVERY_S = 600.0
BEFORE_S = 60.0
# Between two checks whether it is time to ask: the moment to stop moves as steps and saves are measured.
LOOK_S = 5.0


class JobEnd:
    """Asks Slurm when one job ends, as often as the module's docstring says."""

    def __init__(self, job: str, flag: StopFlag) -> None:
        """`job` is the id from scontrol.job_id; the answers go to `flag`."""
        self._job, self._flag = job, flag
        self._asked_at = -math.inf if math.isinf(flag.end) else time.monotonic()
        self._confirmed: float | None = None  # the end that Slurm confirmed shortly before the run would stop

    def ask_if_due(self) -> None:
        """Ask Slurm if it is time to."""
        end, now = self._flag.end, time.monotonic()
        near = time.time() >= self._flag.leave_at - BEFORE_S and self._confirmed != end
        if not near and now < self._asked_at + EVERY_S:
            return
        self._asked_at = now
        if near:
            self._confirmed = end
        job = scontrol.ask(self._job)
        new_end = scontrol.unix_time(job.fields.get("EndTime", ""))
        if job.state != "RUNNING" or new_end is None or new_end == end:
            return
        self._flag.ends_at(new_end)
        if not math.isinf(end):
            streams.warn(f"Slurm now ends this job at {_clock(new_end)}; it was {_clock(end)}")


def watch(job: str, flag: StopFlag) -> None:
    """Start the thread that asks about `job` until this process ends."""
    job_end = JobEnd(job, flag)

    def run() -> None:
        while True:
            with only_informs("the end of the job"):
                job_end.ask_if_due()
            time.sleep(LOOK_S)

    # Slurm sends signals to every process of the job, also to the commands that this thread runs.
    with shielded():
        threading.Thread(target=run, name="job end", daemon=True).start()


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
