"""Runs a probe as a job of its own, with the batch script and the requests of the job that it measures.

No torch in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcgpt import exit_codes
from hpcgpt.errors import UserError
from hpcgpt.estimate.probe.measure import Prepared
from hpcgpt.run import run_folder
from hpcgpt.slurm import code_snapshot, scontrol, submission
from hpcgpt.slurm.partitions import minutes
from hpcgpt.slurm.queue import OVER
from hpcgpt.slurm.sbatch_flags import Flags

LONGEST_MINUTES = 20  # its time limit; a probe that needs more is requeued there, and continues
# What concerns the measured job alone: when it starts, its name and files, and messages to its user.
_NOT_COPIED = ("dependency", "begin", "deadline", "hold", "job-name", "output", "error", "mail-type", "mail-user")
_POLL_S = 1.0
_ASK_SLURM_S = 15.0  # at most this often
_PATIENCE_S = 120.0  # with a controller that cannot be reached


def flags_for(flags: Flags) -> Flags:
    """Return the flags of the probe's job, from those of the job that it measures."""
    kept = {name: value for name, value in flags.items() if name not in _NOT_COPIED}
    limit = minutes(flags["time"])
    if not limit or limit > LONGEST_MINUTES:
        kept["time"] = str(LONGEST_MINUTES)
        kept.pop("signal", None)  # for a longer job: it may leave the probe no time
    return kept


def queue(probe: Prepared, flags: Flags, environment: Sequence[str] = ()) -> str:
    """Queue the probe's job; return its id. `environment`: lines of bash that it runs first.

    Raises:
        UserError: Slurm refuses it.
    """
    parameters = submission.job_parameters({"job-name": f"probe-{probe.folder.name}", **flags_for(flags)}, probe.folder)
    code = code_snapshot.keep(probe.folder, [str(probe.file)])
    job = submission.submit(probe.folder, parameters, [code], environment)
    run_folder.record(probe.folder, "submit", job=job)
    return job


def wait(
    probe: Prepared, job: str, say: Callable[[str], None], ask: Callable[[str], scontrol.Job] | None = None
) -> None:
    """Wait until the probe has finished and its job has ended. `say`: is called with each new state of the job.

    Raises:
        UserError: the job has ended, and the probe has not finished.
    """
    ask = ask or (lambda id_: scontrol.ask(id_, _PATIENCE_S))
    shown, asked_at = "", float("-inf")
    while True:
        ended = run_folder.read_exit(probe.folder)
        finished = ended is not None and ended.status == exit_codes.FINISHED
        if finished or time.monotonic() - asked_at > _ASK_SLURM_S:
            found, asked_at = ask(job), time.monotonic()
            state = found.state if found.answered else "NO ANSWER OF SLURM"
            if state != shown:
                shown = state
                say(f"the probe's job {job}: {state.lower() or 'is no longer known to Slurm'}")
            if not state or state in OVER:
                break
        time.sleep(_POLL_S)
    ended = run_folder.read_exit(probe.folder)
    if not ended or ended.status != exit_codes.FINISHED:
        why = f": {ended.reason}" if ended else ""
        raise UserError(f"the probe failed, job {job} {shown.lower()}{why}; see {_logs(probe.folder, job)}")


def _logs(folder: Path, job: str) -> str:
    logs = sorted(folder.glob(f"logs/{job}_*.log")) or sorted(folder.glob(f"submit/{job}_*.out"))
    return str(logs[-1]) if logs else str(folder)
