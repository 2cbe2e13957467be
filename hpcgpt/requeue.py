"""What the batch script runs before and after the ranks: decide whether the job runs again, and requeue it.

``python -m hpcgpt.requeue folder TRAIN_ARGUMENTS`` checks the configuration, makes the run folder, records this start
of the job and prints the folder. With `doctor.preflight` it also checks the nodes, and if some fail prints them, with
status BAD_NODES: the batch script requeues the job without them. If Slurm itself requeued a job that the policy has
given up, the start is refused.
``python -m hpcgpt.requeue decide --status N TRAIN_ARGUMENTS`` decides, and requeues the job or prints why not.
``... decide --status ending ...`` decides while srun still runs and Slurm is ending the job: see `decide_early`.
``python -m hpcgpt.requeue check TRAIN_ARGUMENTS`` fails on every node where `folder` would fail, and records nothing.

The policy is in hpcgpt.slurm.requeue_policy. The job is requeued by ``scontrol requeue``. If Slurm refuses that
(JobRequeue=0, --no-requeue) a new job is submitted that waits for this one (hpcgpt.slurm.next_job), and if that is
refused too, the command is printed.

`decide` prints "decided" on stdout once it has acted, also if Slurm refused. Without that word the batch script decides
by a small policy in bash: on a node where this program cannot run, or if the job is to be requeued but the disk has no
room for the line in events.jsonl that counts this start. The script counts in the job's comment. Without scontrol, as
in most containers, "requeue" is printed before "decided", if HPCGPT_ACTS says that the batch script will requeue.

No torch in here.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.doctor import preflight
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.run import crash_report, records, run_folder
from hpcgpt.run.crash_report import FirstFailure
from hpcgpt.slurm import bad_nodes, next_job, requeue_policy, restart_history, scontrol
from hpcgpt.slurm.requeue_policy import Decision
from hpcgpt.slurm.scontrol import Job
from hpcgpt.storage import atomic, lease

ENDING = "ending"
REFUSED = 3  # status of `folder` if the policy refuses this start. After 2 the batch script may suspect the node
BAD_NODES = 4  # status of `folder` if some nodes fail doctor.preflight: their names are printed instead of the folder
CANNOT_EXECUTE, NOT_FOUND = 126, 127  # the shell's exit statuses if a rank's program cannot be started
# How long to wait for a controller that is restarting: for an answer, and for the requeue. Both must fit into the time
# that slurm/pretrain.sbatch allows, which is short while Slurm is ending the job.
ASK_S, REQUEUE_S, ENDING_S = 60.0, 150.0, 5.0
ABOUT = "Prepare the run folder, or decide whether the job runs again; for the batch script."


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "check":
        settings = sources.for_training(argv[1:], "requeue check", ABOUT)
        run_folder.prepare(settings.run_folder)
        _claim(settings.run_folder, os.environ)
        return 0
    if not argv or argv[0] not in ("folder", "decide"):
        raise UserError("usage: python -m hpcgpt.requeue folder|check|decide [--status N] TRAIN_ARGUMENTS")
    if argv[0] == "folder":
        settings = sources.for_training(argv[1:], "requeue folder", ABOUT)
        if problem := _begin(settings):
            return cli.print_error(UserError(problem), REFUSED)
        if settings.doctor.preflight == "quick" and scontrol.job_id(os.environ):
            return _preflight(settings)
        print(settings.run_folder)
        return 0
    if len(argv) < 3 or argv[1] != "--status" or not (argv[2].isdigit() or argv[2] == ENDING):
        raise UserError("requeue decide needs --status N first")
    settings = sources.from_command_line(argv[3:], "requeue decide", ABOUT)
    if argv[2] == ENDING and _acts_outside():
        return 1  # only Slurm's tools can find out why Slurm is ending the job
    refused = _act(settings, None if argv[2] == ENDING else int(argv[2]))
    if refused is None:
        return 1
    print("decided")
    return refused


def job_event(job: Job) -> dict[str, Any]:
    """Return the fields of the event `job` for this start; a time that Slurm does not show is left out."""
    times = {
        "queued_at": scontrol.unix_time(job.fields.get("EligibleTime", "")),
        "started_at": scontrol.unix_time(job.fields.get("StartTime", "")),
    }
    known = {key: moment for key, moment in times.items() if moment is not None}
    return {**known, "hosts": world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))}


def _begin(settings: Config) -> str:
    """Prepare the run folder and record this start; return '', or why the job may not train."""
    folder = settings.run_folder
    run_folder.prepare(folder)
    _claim(folder, os.environ)
    job = scontrol.job_id(os.environ)
    if not job:
        return ""
    job_start, newest = world.job_start(), restart_history.newest_step(folder / "checkpoints")
    with suppress(OSError):
        if not lease.is_held(folder) or lease.holder_is_gone(folder):
            run_folder.rotate_records(folder, job_start)
    begun = restart_history.without_older_job([*_events(folder), {"event": "job", "job": job_start}], job_start)
    past = restart_history.count_restarts(begun[:-1], job_start, newest)
    problem = requeue_policy.reason_to_refuse(past, settings.requeue)
    try:
        run_folder.record(folder, "job", job=job_start, newest_step=newest, **job_event(scontrol.ask(job)))
        if problem:
            run_folder.record(folder, "give_up", job=job_start, reason=problem)
    except OSError as error:  # the disk is full, but the job can train
        streams.warn(error)
    if problem:
        return f"job {job} is not started again: {problem}"
    return ""


def _preflight(settings: Config) -> int:
    """Check the nodes; print the run folder, or, with status BAD_NODES, the nodes that the next start is to avoid.

    What all nodes have is a mistake only at the first start: later the same command has worked before. Then none is to
    be avoided, but the only one of a job, which may be at fault.
    """
    folder = settings.run_folder
    failing = preflight.failing(settings)
    if not failing:
        print(folder)
        return 0
    for node, reason in failing.items():
        _log(f"{node} fails the check before the start: {reason}")
    if problem := _record(folder, world.job_start(), [{"event": "preflight", "failing": failing}]):
        streams.warn(problem)
    common = preflight.is_common(failing, len(world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))))
    if common and os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and not os.environ.get("HPCGPT_CHAINED"):
        message = "all nodes fail the check before the start: correct it, or pass --doctor.preflight off"
        return cli.print_error(UserError(message), REFUSED)
    avoided = {} if common and len(failing) > 1 else failing
    bad_nodes.update_list(folder, avoided)
    print(" ".join(avoided))
    return BAD_NODES


def _events(folder: Path) -> list[records.Record]:
    try:
        return records.events(folder)
    except OSError as error:  # without events there is no reason to refuse this start
        streams.warn(error)
        return []


def _claim(folder: Path, env: Mapping[str, str]) -> None:
    """Claim the folder for this task of a job array. Raises UserError if another task has it."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID", "")
    if not array:
        return
    path = folder / "logs" / f"array_{array}.task"
    atomic.create(path, f"{task}\n".encode())
    owner = path.read_text().strip()
    if owner != task:
        raise UserError(
            f"{folder} is the run folder of task {owner} of this job array, and this is task {task}: give each task "
            "its own. '%a' in the arguments is replaced by the task's number: --run.name sweep-%a --run.seed %a"
        )


def _act(settings: Config, status: int | None) -> int | None:
    """Decide and act; `status` is srun's, None while it still runs.

    Returns an exit status; None if the job should run again but this start could not be recorded: then the batch script
    decides, and counts.
    """
    folder, job_start, id_ = settings.run_folder, world.job_start(), scontrol.job_id(os.environ)
    events = restart_history.without_older_job(_events(folder), job_start)
    if any(event["event"] == "chain" and event.get("job") == job_start for event in events):
        _log(f"no requeue of job {id_}: the next job is queued already")
        return 0
    job = scontrol.ask(id_, ENDING_S if status is None else ASK_S)
    exits = crash_report.task_exits(_read(folder / "logs" / f"{job_start}.srun"))
    failure = crash_report.first_failure(exits, crash_report.read(folder, job_start))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    decision = _decision(settings, status, job, restart, events, failure)
    if decision is None:
        return 0
    unwritable = run_folder.why_events_unwritable(folder)
    if decision.requeue and unwritable and not job.node_failed:
        # Each crash would count as the first one, and the job would be requeued forever.
        decision = Decision(False, f"it could not be counted ({decision.reason}): {unwritable}", decision.crashed)
    if decision.crashed or job.node_failed:
        _log(crash_report.report(folder, job_start, failure, exits))

    before = bad_nodes.excluded_nodes(job, job_start, events)
    runs_again = decision.requeue or job.restarts > restart
    hosts = _hosts_to_avoid(settings, job, decision, failure, events, before) if runs_again else []
    # Recorded before the requeue, which may end this process at once.
    counted = _counted_events(decision, status, job, failure, hosts)
    if decision.requeue and not counted and not any(event.get("job") == job_start for event in events):
        counted = [{"event": "job"}]  # the disk had no room for it at the start
    uncounted = _record(folder, job_start, counted)
    if uncounted and decision.requeue:
        _log(f"{decision.reason}. It could not be counted ({uncounted}): the batch script decides")
        return None
    _log(f"{'requeue' if decision.requeue else 'no requeue'} of job {id_}: {decision.reason}")
    patience_s = ENDING_S if status is None else REQUEUE_S
    excluded = [*before.by_user, *hosts]
    requeued, refused = _requeue(id_, job, restart, excluded, patience_s) if decision.requeue else ({}, 0)
    if runs_again and (hosts or before.own) and "next_job" not in requeued:
        hosts = _exclude(id_, job, before, hosts)
    if hosts:
        _log(f"the next start avoids {', '.join(hosts)} ({folder / 'excluded_nodes.json'})")
    informing: list[dict[str, Any]] = [{"event": "excluded", "hosts": hosts}] if hosts else []
    if decision.gave_up:
        informing.append({"event": "give_up", "reason": decision.reason})
    if requeued:
        informing.append({"reason": decision.reason, **requeued})
    elif not decision.crashed and job.restarts <= restart:  # for hpcgpt.status: this job is over
        informing.append({"event": "no_requeue", "reason": decision.reason})
    if problem := _record(folder, job_start, informing):
        streams.warn(problem)
    return refused


def _hosts_to_avoid(
    settings: Config, job: Job, decision: Decision, failure: FirstFailure | None,
    events: Sequence[Mapping[str, Any]], before: bad_nodes.ExcludedNodes,
) -> list[str]:  # fmt: skip
    """Return the nodes that the next start is to avoid, besides those that the user excluded."""
    # If a rank's program cannot be started, a mount is missing: the next start would fail on that node, too.
    has_no_program = bool(failure and failure.status in (CANNOT_EXECUTE, NOT_FOUND))
    adds_nodes = settings.requeue.exclude_bad_nodes or has_no_program
    if not adds_nodes and not before.own:
        return []
    bad = bad_nodes.bad_hosts(
        failure if decision.crashed or (failure and failure.node_failed) else None,
        events,
        settings.requeue.exclude_factor,
    )
    kept = bad_nodes.update_list(settings.run_folder, bad if adds_nodes else {}, before.by_batch_script)
    nodes = scontrol.nodes(job.fields.get("Partition", ""))
    # If Slurm does not show which nodes there are, the list stays unchanged.
    return bad_nodes.excludable_nodes(kept, job, nodes, before.by_user) if nodes else list(before.own)


def _counted_events(
    decision: Decision, status: int | None, job: Job, failure: FirstFailure | None, hosts: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the events that later starts count. `hosts`: those that the next start is to avoid."""
    failed_node = failure.host if failure and failure.node_failed else None
    events: list[dict[str, Any]] = []
    if decision.crashed:
        which = {"rank": failure.rank, "host": failure.host} if failure else {"rank": None, "host": None}
        events.append({"event": "crash", "status": status, "reason": decision.reason, **which, "excluded": list(hosts)})
    if job.node_failed or failed_node is not None:
        events.append({"event": "node_failed", "host": failed_node})
    return events


def _record(folder: Path, job_start: str, events: Sequence[dict[str, Any]]) -> str:
    """Append events of this start; return '' or an error message."""
    try:
        for fields in events:
            run_folder.record(folder, job=job_start, **fields)
    except OSError as error:
        return str(error)
    return ""


def _decision(
    settings: Config, status: int | None, job: Job, restart: int, events: Sequence[Mapping[str, Any]],
    failure: FirstFailure | None,
) -> Decision | None:  # fmt: skip
    newest = restart_history.newest_step(settings.run_folder / "checkpoints")
    past = restart_history.count_restarts(events, world.job_start(), newest)
    if status is None:
        return requeue_policy.decide_early(job, restart, past, settings.requeue)
    ended = run_folder.read_exit(settings.run_folder)
    if ended and ended.attempt != world.job_start():
        ended = None
    return requeue_policy.decide(ended, status, job, restart, past, settings.requeue, failure)


def _requeue(id_: str, job: Job, restart: int, hosts: Sequence[str], patience_s: float) -> tuple[dict[str, str], int]:
    """Requeue the job, or queue a next one. Returns the event to record, {} if both failed, and an exit status."""
    if _acts_outside():
        print("requeue")
        return {"event": "requeue"}, 0
    if not job.batch:
        _log(
            f"job {id_} is an allocation of salloc, which Slurm cannot requeue: run the same command again, here or "
            "in a new one; it continues from the newest checkpoint"
        )
        return {}, 1
    done = scontrol.run_patiently("scontrol", "requeue", id_, patience_s=patience_s)
    # If only Slurm's answer was lost, the job is requeued already, and a second one must not be submitted.
    if done.returncode == 0 or scontrol.ask(id_).restarts > restart:
        return {"event": "requeue"}, 0
    next_id, problem = next_job.submit(job, os.environ, hosts)
    refusal = done.stderr.strip()
    if next_id:
        _log(f"Slurm refuses to requeue job {id_} ({refusal}): job {next_id} will run after it")
        return {"event": "chain", "next_job": next_id}, 0
    print(
        f"error: Slurm refused to requeue job {id_}: {refusal}; and to queue another job after it: {problem}. Submit "
        "the same command again, it continues from the newest checkpoint:\n  "
        f"{next_job.manual_command(job, os.environ, hosts)}",
        file=sys.stderr,
        flush=True,
    )
    return {}, 1


def _acts_outside() -> bool:
    """Is it the batch script that requeues the job, because this program has no scontrol?"""
    return os.environ.get("HPCGPT_ACTS") == "1" and shutil.which("scontrol") is None


def _exclude(id_: str, job: Job, before: bad_nodes.ExcludedNodes, hosts: list[str]) -> list[str]:
    """Exclude `hosts` from the requeued job. Returns them, or [] if Slurm refused."""
    problem = bad_nodes.exclude(id_, job, before, hosts)
    if problem:
        streams.warn(f"Slurm refused to exclude nodes from job {id_} ({', '.join(hosts)}): {problem}")
    return [] if problem else hosts


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _log(text: str) -> None:
    for line in text.splitlines():
        print(f"hpcgpt: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
