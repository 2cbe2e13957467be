"""Checks of the run folder before a job is queued: what would end the job at its start is refused here.

They read the STOP file, the newest checkpoint, the run's jobs in Slurm, and the heartbeat of the attempt that holds the
lease. Nothing is written.

No torch in here.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

from hpcgpt import plan
from hpcgpt.checkpoint import go_back
from hpcgpt.errors import UserError
from hpcgpt.plan import Plan
from hpcgpt.run import run_folder
from hpcgpt.slurm import queue, scontrol
from hpcgpt.storage import lease
from hpcgpt.training import in_effect

# A job in one of these states runs, or will (squeue(1), "job state codes").
_ALIVE = {
    "PENDING": "waits in the queue", "REQUEUED": "waits in the queue", "REQUEUE_HOLD": "is held in the queue",
    "REQUEUE_FED": "waits in the queue", "SPECIAL_EXIT": "is held in the queue", "RUNNING": "is running",
    "CONFIGURING": "is starting", "SUSPENDED": "is suspended", "STOPPED": "is stopped", "RESIZING": "is running",
    "SIGNALING": "is running", "STAGE_OUT": "is ending", "COMPLETING": "is ending",
}  # fmt: skip


def check(planned: Plan, waits_for_others: bool) -> str:
    """Check the run folder; return why a job would have nothing to do, or "" if it would train.

    `waits_for_others`: the job has a dependency on other jobs, so these may still use the folder.

    Raises:
        UserError: a job would be refused, or stop at once: a STOP file, other settings, fewer steps than the
            run has made, only damaged checkpoints, or another job or process that uses the folder.
    """
    folder = planned.config.run_folder
    stop_file = folder / "STOP"
    if stop_file.exists():
        raise UserError(f"{stop_file} keeps this run stopped: remove it to continue")
    state = go_back.state_to_continue_from(planned.config)
    if state:
        plan.check_identity(planned.config, state.identity, planned.identity)
        in_effect.refuse_shorter(state.step, planned)
    if not waits_for_others:
        _refuse_while_held(folder)
    if state and state.step == planned.total_steps and state.pending is None:
        return f"{folder} is finished already, at step {state.step:,} of {planned.total_steps:,}: nothing to do"
    return ""


def _refuse_while_held(folder: Path) -> None:
    jobs = _jobs(folder)
    for job, state in _states(jobs).items():
        if state in _ALIVE:
            raise UserError(
                f"{folder} is the run of job {job}, which {_ALIVE[state]}: end that job first (scancel {job}), give "
                f"this run another --run.name, or queue it to run afterwards: --after {job}"
            )
    if lease.is_held(folder):
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the job's id
            lease.wait_until_gone(folder, "")


def _jobs(folder: Path) -> list[str]:
    """List the Slurm jobs that may use this run folder, tasks of arrays as '12_3': from its events.

    Of a job whose event a full disk has lost `hpcgpt submit` left its script. Those of a sweep are in its first run's
    folder, whose own task is in an event.
    """
    ids = []
    for event in run_folder.events(folder):
        if event.get("event") == "submit":
            ids.append(str(event.get("job")))
        elif event.get("event") in ("job", "start", "chain"):
            ids.append(str(event.get("next_job") or queue.id_of(str(event.get("job")))))
    ids = list(dict.fromkeys(ids[-10:]))
    known = {id_.partition("_")[0] for id_ in ids}
    scripts = sorted(path.name.partition("_")[0] for path in folder.glob("submit/*_submission.sh"))[-10:]
    return [job for job in [*ids, *(id_ for id_ in scripts if id_ not in known)] if re.fullmatch(r"\d+(_\d+)?", job)]


def _states(jobs: list[str]) -> dict[str, str]:
    """Ask Slurm for the states of those jobs that still exist and belong to this user; {} if it does not answer."""
    if not jobs:
        return {}
    # squeue fails on a single id that no longer exists, but of two it omits one: hence one twice. (It refuses 0.)
    asked = [
        "--me",
        "--all",
        "--noheader",
        "--array",
        "--states=all",
        f"--jobs={','.join([*jobs, jobs[0]])}",
        "--format=%i %T",
    ]
    pairs = [line.split() for line in scontrol.run("squeue", *asked).stdout.splitlines()]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
