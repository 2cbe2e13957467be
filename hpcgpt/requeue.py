"""What happens to the job next: run by the batch script, after srun has returned.

``python -m hpcgpt.requeue folder TRAIN_ARGUMENTS`` checks the configuration, makes the run folder, records this
start of the job and prints the folder.
``python -m hpcgpt.requeue decide --status N TRAIN_ARGUMENTS`` decides, and requeues the job or says why not.
``... decide --status ending ...`` while srun still runs and Slurm is ending the job: see `decide_early`.

The policy, in this order:

    Slurm has requeued it already            leave it: nothing is left to do
    cancelled by a user                      leave it
    training is finished                     leave it
    a mistake in what was asked (also one that
      a single rank found), a STOP file,
      another attempt holds the folder       leave it: it needs a person
    saved, please run me again               requeue, unless the last requeue.max_idle starts all ended without
                                             a new checkpoint: it gets nowhere
    a node failed, and Slurm may not requeue requeue
    a crash                                  requeue, unless the last requeue.max_crashes starts all
                                             crashed without a new checkpoint: a crash loop

How: ``scontrol requeue``. Where Slurm refuses that (JobRequeue=0, --no-requeue), a new job is queued behind this
one (hpcgpt.chain), and where that is refused too, the command is printed.

How the attempt ended is read from exit.json, since exit codes get lost under ``srun -K``; who failed first, from
what srun and the ranks said (hpcgpt.faults). That the job was saved and Slurm itself preempted it makes no
difference: before Slurm 24.05 a job that leaves within its grace time is not requeued by Slurm.
SLURM_RESTART_COUNT counts every kind of restart, and is no budget for crashes; events.jsonl is, and it counts
over a chain of jobs as well.

No torch in here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt import chain, cli, config_sources, durable, excluded, faults, records, runfolder, slurm, world
from hpcgpt.config import Config, Requeue
from hpcgpt.errors import USER_MISTAKE, UserError
from hpcgpt.faults import Blame
from hpcgpt.preempt import Stop
from hpcgpt.runfolder import AGAIN, FINISHED, SUPERSEDED, Exit
from hpcgpt.slurm import Job

ENDING = "ending"
# How long a controller that is being restarted is waited for: the question, and the requeue. Both have to fit into
# the time that slurm/pretrain.sbatch gives; while Slurm is ending the job there is little of it.
ASK_S, REQUEUE_S, ENDING_S = 60.0, 150.0, 5.0
ABOUT = "What the batch script asks: where the run folder is, and whether the job is to run again."


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str
    crashed: bool = False


@dataclass(frozen=True)
class Before:
    """What earlier starts came to: how many in a row crashed, or ended at all, since the last new checkpoint."""

    crashes: int = 0
    idle: int = 0


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in ("folder", "decide"):
        raise UserError("usage: python -m hpcgpt.requeue folder|decide [--status N] TRAIN_ARGUMENTS")
    if argv[0] == "folder":
        settings = config_sources.from_command_line(argv[1:], "requeue folder", ABOUT)
        _begin(settings.run_folder)
        print(settings.run_folder)
        return 0
    if len(argv) < 3 or argv[1] != "--status" or not (argv[2].isdigit() or argv[2] == ENDING):
        raise UserError("requeue decide needs --status N first")
    settings = config_sources.from_command_line(argv[3:], "requeue decide", ABOUT)
    return _act(settings, None if argv[2] == ENDING else int(argv[2]))


def decide(
    ended: Exit | None, status: int, job: Job, restart: int, before: Before, limits: Requeue,
    blamed: Blame | None = None,
) -> Decision:  # fmt: skip
    """The policy. `ended` is this attempt's exit.json, None if rank 0 could not write one.

    `restart` is the number of this start of the job.
    """
    if job.restarts > restart:
        return Decision(False, "Slurm has requeued it already")
    if job.cancelled:
        return Decision(False, "the job was cancelled")
    if ended and ended.status == FINISHED:
        return Decision(False, "training is finished")
    if ended and ended.status == USER_MISTAKE:
        return Decision(False, f"it needs a person: {ended.reason}")
    if ended and ended.status == AGAIN:
        if ended.reason == Stop.FILE.words:
            return Decision(False, "a STOP file asks the run to stay stopped")
        return _again(f"saved at step {ended.step:,}: {ended.reason}", before, limits)
    if job.node_failed:
        return Decision(True, "a node failed")
    # What a single rank found, or where rank 0 could not say it: srun ended the others, and their words are lost.
    found = blamed.status if blamed else status
    if found in (USER_MISTAKE, SUPERSEDED):
        who = "see the log" if not blamed else str(blamed) if blamed.reason else f"{blamed}: see the log"
        return Decision(False, f"it needs a person: {who}")
    # No word from rank 0, as on a full disk; but srun returns these only if every rank left with them.
    if ended is None and status == FINISHED:
        return Decision(False, "training is finished")
    if ended is None and status == AGAIN:
        return _again("saved, by the ranks' exit status", before, limits)
    what = ended.reason if ended else str(blamed or f"the ranks left with status {status} and no word")
    crashes = before.crashes + 1
    if crashes >= limits.max_crashes:
        return Decision(False, f"crash loop: {crashes} crashes without a new checkpoint, the last one: {what}", True)
    return Decision(True, f"crash {crashes} since the last new checkpoint: {what}", True)


def decide_early(job: Job, restart: int, before: Before, limits: Requeue) -> Decision | None:
    """What Slurm will not do by itself after it has ended this job; None: nothing, or srun's end will tell more.

    Slurm sent SIGTERM to the batch script, and SIGKILL follows after KillWait. Ranks that hang use all of that up.
    """
    if job.restarts > restart:
        return None
    if job.node_failed:
        return Decision(True, "a node failed")
    if job.over_time:
        return _again("at its time limit, and Slurm ends it", before, limits)
    if job.preempted and job.fields.get("Requeue") == "0":
        return Decision(True, "preempted")
    return None


def _again(why: str, before: Before, limits: Requeue) -> Decision:
    if before.idle + 1 >= limits.max_idle:
        return Decision(
            False,
            f"it gets nowhere: {before.idle + 1} starts in a row ended without a new checkpoint, the last one {why}. "
            "Is the time limit too short for the way to the first step? Submit it again to go on",
        )
    return Decision(True, why)


def so_far(events: Sequence[Mapping[str, Any]]) -> Before:
    """Crashes, and starts of jobs that came back at all, since the last checkpoint of a step that had none before.

    A job that a person submitted begins anew: neither an earlier start nor the chain announced its number.
    """
    newest, crashes, idle = 0, 0, 0
    announced: set[str] = set()
    for event in events:
        # A start at a step tells of its checkpoint too: the word of the one who made it may be lost.
        if event["event"] in ("save", "start") and event.get("step", 0) > newest:
            newest, crashes, idle = event["step"], 0, 0
        if event["event"] == "job":
            job = event.get("job", "").rpartition("_")[0]
            if job not in announced:
                crashes, idle = 0, 0
            announced = {job}
        crashes += event["event"] == "crash"
        idle += event["event"] in ("requeue", "chain")
        if event["event"] == "chain":
            announced.add(event.get("next_job", ""))
    return Before(crashes, idle)


def job_event(job: Job) -> dict[str, Any]:
    """What the event `job` records of this start; a time that Slurm does not give now is left out."""
    times = {
        "queued_at": slurm.unix_time(job.fields.get("EligibleTime", "")),
        "started_at": slurm.unix_time(job.fields.get("StartTime", "")),
    }
    known = {key: moment for key, moment in times.items() if moment is not None}
    return {**known, "hosts": world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))}


def _begin(folder: Path) -> None:
    runfolder.prepare(folder)
    job = slurm.job_id(os.environ)
    if not job:
        return
    _claim(folder, os.environ)
    try:
        runfolder.record(folder, "job", job=world.job_attempt(), **job_event(slurm.ask(job)))
    except OSError as error:  # the disk is full: training can go on all the same
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _claim(folder: Path, env: Mapping[str, str]) -> None:
    """One task of a job array, and no other, may have this folder. Raises UserError for the others."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID", "")
    if not array:
        return
    path = folder / "logs" / f"array_{array}.task"
    durable.create(path, f"{task}\n".encode())
    owner = path.read_text().strip()
    if owner != task:
        raise UserError(
            f"{folder} is the run folder of task {owner} of this job array, and so not that of task {task}: give each "
            "task its own. '%a' in the arguments stands for the task's number: --run.name sweep-%a --run.seed %a"
        )


def _act(settings: Config, status: int | None) -> int:
    """Decide and act; `status` is srun's, None while it still runs."""
    folder, attempt, id_ = settings.run_folder, world.job_attempt(), slurm.job_id(os.environ)
    events = records.events(folder)
    if any(event["event"] == "chain" and event.get("job") == attempt for event in events):
        _say(f"no requeue of job {id_}: another one waits behind it already")
        return 0
    job = slurm.ask(id_, ENDING_S if status is None else ASK_S)
    ends = faults.deaths(_read(folder / "logs" / f"{attempt}.srun"))
    blamed = faults.blame(ends, faults.read(folder, attempt))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    decision = _decision(settings, status, job, restart, events, blamed)
    if decision is None:
        return 0
    barred = runfolder.barred(folder)
    if decision.requeue and barred and not job.node_failed:
        # Each start would count as the first one, without end.
        decision = Decision(False, f"it could not be counted ({decision.why}): {barred}", decision.crashed)
    if decision.crashed or job.node_failed:
        _say(faults.report(folder, attempt, blamed, ends))
    _say(f"{'requeue' if decision.requeue else 'no requeue'} of job {id_}: {decision.why}")

    hosts: list[str] = []
    by_a_node = bool(blamed and blamed.how == faults.NODE_FAILED)
    if settings.requeue.exclude_bad_nodes and (decision.requeue or job.restarts > restart):
        bad = excluded.bad_hosts(
            blamed if decision.crashed or by_a_node else None, events, settings.requeue.exclude_factor
        )
        nodes = slurm.nodes(job.fields.get("Partition", ""))
        hosts = excluded.affordable(excluded.remember(folder, bad), job, nodes)
    patience_s = ENDING_S if status is None else REQUEUE_S
    came_back, refused = _bring_back(id_, job, restart, hosts, patience_s) if decision.requeue else ({}, 0)
    if hosts and "next_job" not in came_back:
        hosts = _exclude(id_, job, hosts)
    if hosts:
        _say(f"the next start keeps away from {', '.join(hosts)} ({folder / 'excluded_nodes.json'})")
    try:  # afterwards: a full disk must not keep the job from running again
        if decision.crashed:
            who = {"rank": blamed.rank, "host": blamed.host} if blamed else {"rank": None, "host": None}
            runfolder.record(folder, "crash", job=attempt, status=status, reason=decision.why, **who, excluded=hosts)
        if came_back:
            runfolder.record(folder, job=attempt, reason=decision.why, **came_back)
        elif not decision.crashed and job.restarts <= restart:  # for hpcgpt.status: this job is over
            runfolder.record(folder, "no_requeue", job=attempt, reason=decision.why)
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    return refused


def _decision(
    settings: Config, status: int | None, job: Job, restart: int, events: Sequence[Mapping[str, Any]],
    blamed: Blame | None,
) -> Decision | None:  # fmt: skip
    if status is None:
        return decide_early(job, restart, so_far(events), settings.requeue)
    ended = runfolder.read_exit(settings.run_folder)
    if ended and ended.attempt != world.job_attempt():
        ended = None
    return decide(ended, status, job, restart, so_far(events), settings.requeue, blamed)


def _bring_back(
    id_: str, job: Job, restart: int, hosts: Sequence[str], patience_s: float
) -> tuple[dict[str, str], int]:
    """Bring the job back. Returns what to record of it, {} if it does not come back, and an exit status."""
    if not job.batch:
        _say(
            f"job {id_} is an allocation of salloc, which Slurm cannot requeue: run the same command again, here or "
            "in a new one; it goes on from the newest checkpoint"
        )
        return {}, 1
    done = slurm.run_patiently("scontrol", "requeue", id_, patience_s=patience_s)
    # An answer that was lost on its way is no refusal, and a second job would be one too many.
    if done.returncode == 0 or slurm.ask(id_).restarts > restart:
        return {"event": "requeue"}, 0
    next_job, problem = chain.submit(job, os.environ, hosts)
    said = done.stderr.strip()
    if next_job:
        _say(f"Slurm refuses to requeue job {id_} ({said}): job {next_job} waits behind it")
        return {"event": "chain", "next_job": next_job}, 0
    print(
        f"error: Slurm refused to requeue job {id_}: {said}; and to queue another one behind it: {problem}. Submit the "
        f"same command again, it goes on from the newest checkpoint:\n  {chain.by_hand(job, os.environ, hosts)}",
        file=sys.stderr,
        flush=True,
    )
    return {}, 1


def _exclude(id_: str, job: Job, hosts: list[str]) -> list[str]:
    problem = excluded.tell(id_, job, hosts)
    if problem:
        _say(f"warning: Slurm would not keep job {id_} away from {', '.join(hosts)}: {problem}")
    return [] if problem else hosts


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _say(text: str) -> None:
    for line in text.splitlines():
        print(f"hpcgpt: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
