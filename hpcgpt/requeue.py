"""What happens to the job next: run by the batch script, after srun has returned.

``python -m hpcgpt.requeue folder TRAIN_ARGUMENTS`` checks the configuration, makes the run folder and prints it.
``python -m hpcgpt.requeue decide --status N TRAIN_ARGUMENTS`` decides, and requeues the job or says why not.

The policy, in this order:

    Slurm has requeued it already            leave it: nothing is left to do
    cancelled by a user                      leave it
    training is finished                     leave it
    a mistake in what was asked, a STOP file,
      another attempt holds the folder       leave it: it needs a person
    saved, please run me again               requeue
    a crash                                  requeue, unless the last requeue.max_crashes starts all
                                             crashed without a new checkpoint: a crash loop

How the attempt ended is read from exit.json, since exit codes get lost under ``srun -K``. That the job was
saved and Slurm itself preempted it makes no difference: before Slurm 24.05 a job that leaves within its
grace time is not requeued by Slurm. A node failure never comes here, Slurm requeues those by itself.
SLURM_RESTART_COUNT counts every kind of restart, and is no budget for crashes; events.jsonl is.

No torch in here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcgpt import cli, config, runfolder, world
from hpcgpt.cli import USER_MISTAKE
from hpcgpt.preempt import Stop
from hpcgpt.runfolder import AGAIN, FINISHED, SUPERSEDED, Exit

ABOUT = "What the batch script asks: where the run folder is, and whether the job is to run again."


@dataclass(frozen=True)
class Job:
    """What Slurm says of the job after srun has returned.

    A job that srun's end left alone is RUNNING. One that Slurm itself is ending is COMPLETING, and Slurm 22.05
    does not say why unless it was the time limit: what is left is a person's scancel.
    """

    state: str
    restarts: int = 0
    preempted: bool = False
    over_time: bool = False

    @property
    def cancelled(self) -> bool:
        ending = self.state in ("COMPLETING", "CANCELLED")
        return ending and not self.preempted and not self.over_time


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str
    crashed: bool = False


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in ("folder", "decide"):
        raise ValueError("usage: python -m hpcgpt.requeue folder|decide [--status N] TRAIN_ARGUMENTS")
    if argv[0] == "folder":
        settings = config.from_command_line(argv[1:], "requeue folder", ABOUT)
        runfolder.prepare(settings.run_folder)
        print(settings.run_folder)
        return 0
    if len(argv) < 3 or argv[1] != "--status" or not argv[2].isdigit():
        raise ValueError("requeue decide needs --status N first")
    settings = config.from_command_line(argv[3:], "requeue decide", ABOUT)
    return _act(settings, int(argv[2]))


def decide(ended: Exit | None, status: int, job: Job, restart: int, crashes_before: int, max_crashes: int) -> Decision:
    """The policy. `ended` is this attempt's exit.json, None if rank 0 could not write one.

    `restart` is the number of this start of the job, and `crashes_before` counts the starts in a row that
    crashed since the last new checkpoint.
    """
    if job.restarts > restart:
        return Decision(False, "Slurm has requeued it already")
    if job.cancelled:
        return Decision(False, "the job was cancelled")
    if ended and ended.status == FINISHED:
        return Decision(False, "training is finished")
    if ended and ended.status == USER_MISTAKE:
        return Decision(False, f"it needs a person: {ended.reason}")
    if ended is None and status in (USER_MISTAKE, SUPERSEDED):
        return Decision(False, "it needs a person: see the log")
    if ended and ended.status == AGAIN:
        if ended.reason == Stop.FILE.words:
            return Decision(False, "a STOP file asks the run to stay stopped")
        return Decision(True, f"saved at step {ended.step:,}: {ended.reason}")
    # No word from rank 0, as on a full disk; but srun returns these only if every rank left with them.
    if ended is None and status == FINISHED:
        return Decision(False, "training is finished")
    if ended is None and status == AGAIN:
        return Decision(True, "saved, by the ranks' exit status")
    what = ended.reason if ended else f"the ranks left with status {status} and no word"
    if crashes_before + 1 >= max_crashes:
        return Decision(
            False, f"crash loop: {crashes_before + 1} crashes without a new checkpoint, the last one: {what}", True
        )
    return Decision(True, f"crash {crashes_before + 1} since the last new checkpoint: {what}", True)


def crashes_in_a_row(events: Sequence[Mapping[str, Any]]) -> int:
    """Crashes since the last checkpoint of a step that had none before."""
    newest, crashes = 0, 0
    for event in events:
        if event["event"] == "save" and event["step"] > newest:
            newest, crashes = event["step"], 0
        crashes += event["event"] == "crash"
    return crashes


def _act(settings: config.Config, status: int) -> int:
    folder, job = settings.run_folder, job_id(os.environ)
    ended = runfolder.read_exit(folder)
    if ended and ended.attempt != world.job_attempt():
        ended = None
    decision = decide(
        ended,
        status,
        _ask(job),
        int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        crashes_in_a_row(runfolder.events(folder)),
        settings.requeue.max_crashes,
    )
    verb = "requeue" if decision.requeue else "no requeue"
    print(f"hpcgpt: {verb} of job {job}: {decision.why}", file=sys.stderr, flush=True)
    refused = _requeue(job) if decision.requeue else 0
    try:  # afterwards: a full disk must not keep the job from running again
        if decision.crashed:
            runfolder.record(folder, "crash", job=world.job_attempt(), status=status, reason=decision.why)
        if decision.requeue:
            runfolder.record(folder, "requeue", job=world.job_attempt(), reason=decision.why)
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    return refused


def job_id(env: Mapping[str, str]) -> str:
    """The id to requeue. The plain id of an array's task may stand for the whole array."""
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def _ask(job: str) -> Job:
    text = _slurm("scontrol", "--oneliner", "show", "job", job).stdout
    fields = dict(re.findall(r"\b(\w+)=(\S+)", text))
    return Job(
        fields.get("JobState", ""),
        int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") != "None",
        over_time=fields.get("Reason") == "TimeLimit",
    )


def _requeue(job: str) -> int:
    done = _slurm("scontrol", "requeue", job)
    if done.returncode == 0:
        return 0
    print(
        f"error: Slurm refused to requeue job {job}: {done.stderr.strip()}. Submit the same command again: it goes "
        "on from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    return 1


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    """Ask Slurm. A controller that does not answer counts as a refusal."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within 20 s")


if __name__ == "__main__":
    cli.run(main)
