"""The requeue policy: whether a job runs again, from how its newest attempt ended and what its starts gained.

The first line that applies decides:

    Slurm has requeued the job already      leave it: nothing is left to do
    a user has cancelled the job            leave it
    training is finished                    leave it
    rank 0 has recorded a user's mistake    leave it: a person has to act
    it was terminated and has saved, since  leave it: a person has to act. They were processes that each train
      another task found a user's mistake   alone, or were started with different arguments
    saved before the end                    leave it if a STOP file was the reason; else requeue, unless the last
                                            requeue.max_idle starts made no progress
    a node failed, and Slurm may not        requeue, unless the last requeue.max_node_failures starts ended so without
      requeue                               a new checkpoint
    another rank has found a user's         leave it: a person has to act
      mistake, or another attempt has the
      run folder
    exit.json could not be written, and     as above: finished, or saved before the end
      srun returned 0 or 75
    a crash                                 requeue, unless the last requeue.max_crashes starts crashed without a new
                                            checkpoint (a crash loop), or the last requeue.max_idle made no progress

A start made progress if it saved a checkpoint of a later step than the one it resumed at, and trained for at least as
long as it took to start. One such start resets all counts. They are kept per chain of jobs, whatever other jobs do in
the same run folder: see hpcgpt.slurm.restart_history. After a preemption or a node failure Slurm requeues without
asking: then the next start asks this policy before its ranks are started, and ends with status 2 if it is refused. The
reason that is logged for a requeue reports each start that made no progress.

How the attempt ended is read from exit.json, since exit codes get lost under ``srun -K``; the first failure, from what
srun and the ranks wrote (hpcgpt.run.crash_report). A job that was saved and preempted is requeued like any saved job:
before Slurm 24.05 Slurm does not requeue a job that exits within its grace time. SLURM_RESTART_COUNT counts every kind
of restart, so crashes are counted from events.jsonl and the checkpoints.

No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcgpt.config.operation import Requeue
from hpcgpt.distributed.stop_signals import Stop
from hpcgpt.exit_codes import AGAIN, FINISHED, SUPERSEDED, USER_MISTAKE
from hpcgpt.output.counted import counted
from hpcgpt.run.crash_report import FirstFailure
from hpcgpt.run.run_folder import Exit
from hpcgpt.slurm.restart_history import RestartHistory
from hpcgpt.slurm.scontrol import Job

CANCELLED = "the job was cancelled"


@dataclass(frozen=True)
class Decision:
    """`finished`: training is complete. `crashed`: the start counts as a crash. `gave_up`: a limit was reached."""

    requeue: bool
    reason: str
    crashed: bool = False
    gave_up: bool = False
    finished: bool = False


def decide(
    ended: Exit | None, status: int, job: Job, restart: int, past: RestartHistory, limits: Requeue,
    failure: FirstFailure | None = None,
) -> Decision:  # fmt: skip
    """Decide after srun has returned with `status`.

    `ended` is this attempt's exit.json, None if rank 0 could not write one; `restart` is the number of this start of
    the job.
    """
    if job.restarts > restart:
        return Decision(False, "Slurm has requeued it already")
    if job.cancelled:
        return Decision(False, CANCELLED)
    if ended and ended.status == FINISHED:
        return Decision(False, "training is finished", finished=True)
    if ended and ended.status == USER_MISTAKE:
        return Decision(False, f"a person has to act: {ended.reason}")
    if ended and ended.status == AGAIN:
        if ended.stop == Stop.FILE:
            return Decision(False, "a STOP file keeps the run stopped")
        # srun -K ends the other tasks. Ranks of one world would have found the mistake together.
        if ended.stop == Stop.TERMINATED and failure and failure.status == USER_MISTAKE:
            return Decision(False, f"a person has to act: {failure}")
        return _again(f"saved at step {ended.step:,}: {ended.reason}", past, limits)
    if job.node_failed:
        return _node_failed(past, limits)
    # A mistake that one rank found, or that rank 0 could not write down: srun ended the other ranks.
    found = failure.status if failure else status
    if found in (USER_MISTAKE, SUPERSEDED):
        details = "see the log" if not failure else str(failure) if failure.reason else f"{failure}: see the log"
        return Decision(False, f"a person has to act: {details}")
    # Rank 0 wrote nothing, as on a full disk; but srun returns these only if every rank exited with them.
    if ended is None and status == FINISHED:
        return Decision(False, "training is finished", finished=True)
    if ended is None and status == AGAIN:
        return _again("saved, by the ranks' exit status", past, limits)
    what = ended.reason if ended else str(failure or f"the ranks exited with status {status} and reported no error")
    crashes = past.crashes + 1
    if crashes >= limits.max_crashes:
        return Decision(
            False,
            f"crash loop: {counted(crashes, 'crash', 'crashes')} without a new checkpoint, the last one: {what}",
            True,
            gave_up=True,
        )
    return _again(f"crash {crashes} since the last new checkpoint: {what}", past, limits, crashed=True)


def decide_early(job: Job, restart: int, past: RestartHistory, limits: Requeue) -> Decision | None:
    """Decide while Slurm is ending the job; None if Slurm acts by itself, or the decision can wait for srun's end.

    Slurm has sent SIGTERM to the batch script, and sends SIGKILL after KillWait. Ranks that hang use up all that time.
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


def reason_to_refuse(past: RestartHistory, limits: Requeue) -> str:
    """Return why a start may not train, asked before its ranks are started; '' if it may."""
    if past.without_progress >= limits.max_idle:
        return _no_progress_message(past)
    if past.node_failures >= limits.max_node_failures:
        return _node_failures_message(past.node_failures)
    return ""


def _again(why: str, past: RestartHistory, limits: Requeue, crashed: bool = False) -> Decision:
    if past.without_progress >= limits.max_idle:
        return Decision(False, f"{_no_progress_message(past)} ({why})", crashed, gave_up=True)
    if past.without_progress and past.last:
        why += (
            f". This start {past.last.summary}: {counted(past.without_progress, 'start')} in a row without progress, "
            f"{limits.max_idle} allowed"
        )
    return Decision(True, why, crashed)


def _node_failed(past: RestartHistory, limits: Requeue) -> Decision:
    failures = past.node_failures + 1
    if failures >= limits.max_node_failures:
        return Decision(False, _node_failures_message(failures), gave_up=True)
    return Decision(True, "a node failed")


def _no_progress_message(past: RestartHistory) -> str:
    last = f", the last one {past.last.summary}" if past.last else ""
    return (
        f"no progress: {counted(past.without_progress, 'start')} in a row made no new checkpoint, or trained for less "
        f"time than they took to start{last}. If checkpoints could not be written, make room for them; else submit it "
        "again with a longer --time, or on nodes that are preempted less. "
        "requeue.max_idle sets how many such starts are allowed"
    )


def _node_failures_message(count: int) -> str:
    return (
        f"{counted(count, 'start')} without a new checkpoint ended with a node failure: check the nodes, then submit "
        "it again. requeue.max_node_failures sets how many are allowed"
    )
