"""The requeue policy: whether a job runs again, from how its newest attempt ended and from its starts so far.

In this order:

    Slurm has requeued it already            leave it: nothing is left to do
    cancelled by a user                      leave it
    training is finished                     leave it
    a mistake in what was asked (also one that
      a single rank found), a STOP file,
      another attempt holds the folder       leave it: it needs a person
    saved, please run me again               requeue, unless it gets nowhere: the last requeue.max_idle starts were
                                             each not worth it
    a node failed, and Slurm may not requeue requeue, unless the last requeue.max_node_failures starts ended so without
                                             a new checkpoint
    a crash                                  requeue, unless the last requeue.max_crashes starts crashed without a new
                                             checkpoint (a crash loop), or it gets nowhere

A start was worth it if it made a checkpoint of a later step than it resumed at, and trained for at least as long as it
took to start. One such start resets all counts. Counted is per chain of jobs, whatever other jobs did in this folder
meanwhile: see hpcgpt.slurm.restart_history. Slurm requeues by itself after a preemption or a failed node, without
asking: so the next start asks, before its ranks are started, and leaves with status 2. Each start that was not worth it
is told so.

How the attempt ended is read from exit.json, since exit codes get lost under ``srun -K``; who failed first, from
what srun and the ranks said (hpcgpt.run.crash_report). That the job was saved and Slurm itself preempted it makes no
difference: before Slurm 24.05 a job that leaves within its grace time is not requeued by Slurm.
SLURM_RESTART_COUNT counts every kind of restart, and is no budget for crashes; events.jsonl and the checkpoints are.

No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcgpt.config.options import Requeue
from hpcgpt.distributed.stop_signals import Stop
from hpcgpt.exit_codes import AGAIN, FINISHED, SUPERSEDED, USER_MISTAKE
from hpcgpt.run.crash_report import Blame
from hpcgpt.run.run_folder import Exit
from hpcgpt.slurm.restart_history import History
from hpcgpt.slurm.scontrol import Job


@dataclass(frozen=True)
class Decision:
    requeue: bool
    why: str
    crashed: bool = False
    gave_up: bool = False


def decide(
    ended: Exit | None, status: int, job: Job, restart: int, past: History, limits: Requeue,
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
        return _again(f"saved at step {ended.step:,}: {ended.reason}", past, limits)
    if job.node_failed:
        return _node_failed(past, limits)
    # What a single rank found, or where rank 0 could not say it: srun ended the others, and their words are lost.
    found = blamed.status if blamed else status
    if found in (USER_MISTAKE, SUPERSEDED):
        who = "see the log" if not blamed else str(blamed) if blamed.reason else f"{blamed}: see the log"
        return Decision(False, f"it needs a person: {who}")
    # No word from rank 0, as on a full disk; but srun returns these only if every rank left with them.
    if ended is None and status == FINISHED:
        return Decision(False, "training is finished")
    if ended is None and status == AGAIN:
        return _again("saved, by the ranks' exit status", past, limits)
    what = ended.reason if ended else str(blamed or f"the ranks left with status {status} and no word")
    crashes = past.crashes + 1
    if crashes >= limits.max_crashes:
        return Decision(
            False, f"crash loop: {crashes} crashes without a new checkpoint, the last one: {what}", True, gave_up=True
        )
    return _again(f"crash {crashes} since the last new checkpoint: {what}", past, limits, crashed=True)


def decide_early(job: Job, restart: int, past: History, limits: Requeue) -> Decision | None:
    """What Slurm will not do by itself after it has ended this job; None: nothing, or srun's end will tell more.

    Slurm sent SIGTERM to the batch script, and SIGKILL follows after KillWait. Ranks that hang use all of that up.
    """
    if job.restarts > restart:
        return None
    if job.node_failed:
        return _node_failed(past, limits)
    if job.over_time:
        return _again("at its time limit, and Slurm ends it", past, limits)
    if job.preempted and job.fields.get("Requeue") == "0":
        return Decision(True, "preempted")
    return None


def _again(why: str, past: History, limits: Requeue, crashed: bool = False) -> Decision:
    if past.idle >= limits.max_idle:
        return Decision(False, f"{nowhere(past)} ({why})", crashed, gave_up=True)
    if past.idle and past.last:
        why += f". This start {past.last.words}: {past.idle} of {limits.max_idle} in a row not worth their start"
    return Decision(True, why, crashed)


def _node_failed(past: History, limits: Requeue) -> Decision:
    failures = past.node_failures + 1
    if failures >= limits.max_node_failures:
        return Decision(False, node_failures(failures), gave_up=True)
    return Decision(True, "a node failed")


def nowhere(past: History) -> str:
    """Why a job whose starts are not worth it is not started once more."""
    last = f", the last one {past.last.words}" if past.last else ""
    return (
        f"it gets nowhere: {past.idle} starts in a row trained for less time than they took to start{last}. Ask for a "
        "longer --time, or for nodes that are preempted less, and submit it again; requeue.max_idle is how many may"
    )


def node_failures(count: int) -> str:
    """Why a job whose nodes keep failing is not started once more."""
    return (
        f"{count} starts without a new checkpoint ended with a node that failed: look at the nodes, then submit it "
        "again; requeue.max_node_failures is how many may"
    )


def hopeless(past: History, limits: Requeue) -> str:
    """Why a job that Slurm brought back by itself is not to train again; '' if it may."""
    if past.idle >= limits.max_idle:
        return nowhere(past)
    if past.node_failures >= limits.max_node_failures:
        return node_failures(past.node_failures)
    return ""
