"""When the job ends, asked of Slurm while it runs.

SLURM_JOB_END_TIME says when the job was to end as its batch script began. The end may change after that: a person, or
an administrator, gives the job more time or less (``scontrol update TimeLimit=``), and a job that was suspended ends
later. So rank 0 asks again, on a thread of its own:

    at once               where the environment does not say when the job ends
    every EVERY_S         one question about one job is little work for slurmctld
    BEFORE_S before the   once for each end that is believed: a job that was given more time just before its end is
    run would leave       not to leave too early

An answer counts only while the job is RUNNING: while Slurm is ending it the end is that moment. No answer, or one that
cannot be understood, changes nothing. A question waits for 20 s at most (hpcgpt.slurm.scontrol).

No torch in here.
"""

from __future__ import annotations

import math
import sys
import threading
import time

from hpcgpt.distributed.stop_signals import StopFlag, shielded
from hpcgpt.output.best_effort import only_informs
from hpcgpt.slurm import scontrol

EVERY_S = 600.0
BEFORE_S = 60.0
LOOK_S = (
    5.0  # between two looks at whether it is time to ask: the moment to leave moves as saves and steps are measured
)


class JobEnd:
    """What is asked about one job, and when."""

    def __init__(self, job: str, flag: StopFlag) -> None:
        """`job` is its id, scontrol.job_id; the answers go to `flag`."""
        self._job, self._flag = job, flag
        self._asked_at = -math.inf if math.isinf(flag.end) else time.monotonic()
        self._confirmed: float | None = None  # the end about which Slurm was asked shortly before leaving

    def look(self) -> None:
        """Ask, if it is time to."""
        end, now = self._flag.end, time.monotonic()
        near = time.time() >= self._flag.leave_at - BEFORE_S and self._confirmed != end
        if not near and now < self._asked_at + EVERY_S:
            return
        self._asked_at = now
        if near:
            self._confirmed = end
        job = scontrol.ask(self._job)
        said = scontrol.unix_time(job.fields.get("EndTime", ""))
        if job.state != "RUNNING" or said is None or said == end:
            return
        self._flag.ends_at(said)
        if not math.isinf(end):
            print(f"warning: Slurm now ends this job at {_clock(said)}; it was {_clock(end)}", file=sys.stderr)


def watch(job: str, flag: StopFlag) -> None:
    """Ask about that job for as long as this process lives."""
    asked = JobEnd(job, flag)

    def run() -> None:
        while True:
            with only_informs("the end of the job"):
                asked.look()
            time.sleep(LOOK_S)

    # Slurm's signals reach the commands that ask, too.
    with shielded():
        threading.Thread(target=run, name="job end", daemon=True).start()


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
