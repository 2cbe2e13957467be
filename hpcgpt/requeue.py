"""What happens to the job next: run by the batch script, after srun has returned.

``python -m hpcgpt.requeue folder TRAIN_ARGUMENTS`` checks the configuration, makes the run folder, records this
start of the job and prints the folder. It refuses a job that Slurm itself brought back, and that gets nowhere.
``python -m hpcgpt.requeue decide --status N TRAIN_ARGUMENTS`` decides, and requeues the job or says why not.
``... decide --status ending ...`` while srun still runs and Slurm is ending the job: see `decide_early`.
``python -m hpcgpt.requeue check TRAIN_ARGUMENTS`` fails on any node where `folder` would fail, and records nothing.

`decide` prints "decided" on stdout once it has acted, also where Slurm refused. Without that word the batch script
decides, with a minimal policy of its own in bash: on a node where this one cannot run, and where the job would come
back and the disk has no room for a line in events.jsonl. Such a start could not be counted here; the script counts in
Slurm. Where there is no scontrol, as in most containers, and the batch script said by HPCGPT_ACTS that it can act
instead, "requeue" is printed before that.

The policy is in hpcgpt.slurm.requeue_policy.

How: ``scontrol requeue``. Where Slurm refuses that (JobRequeue=0, --no-requeue), a new job is queued behind this
one (hpcgpt.slurm.next_job), and where that is refused too, the command is printed.

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
from hpcgpt.errors import UserError
from hpcgpt.run import crash_report, records, run_folder
from hpcgpt.run.crash_report import Blame
from hpcgpt.slurm import bad_nodes, next_job, requeue_policy, restart_history, scontrol
from hpcgpt.slurm.requeue_policy import Decision
from hpcgpt.slurm.scontrol import Job
from hpcgpt.storage import atomic, lease

ENDING = "ending"
REFUSED = 3  # status of `folder`: this start is not worth it. To the batch script 2 may be a fault of the node
CANNOT_EXECUTE, NOT_FOUND = 126, 127  # the shell's exit statuses, when the rank's program cannot be started
# How long a controller that is being restarted is waited for: the question, and the requeue. Both have to fit into
# the time that slurm/pretrain.sbatch gives; while Slurm is ending the job there is little of it.
ASK_S, REQUEUE_S, ENDING_S = 60.0, 150.0, 5.0
ABOUT = "What the batch script asks: where the run folder is, and whether the job is to run again."


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "check":
        settings = sources.from_command_line(argv[1:], "requeue check", ABOUT)
        run_folder.prepare(settings.run_folder)
        _claim(settings.run_folder, os.environ)
        return 0
    if not argv or argv[0] not in ("folder", "decide"):
        raise UserError("usage: python -m hpcgpt.requeue folder|decide [--status N] TRAIN_ARGUMENTS")
    if argv[0] == "folder":
        settings = sources.from_command_line(argv[1:], "requeue folder", ABOUT)
        if problem := _begin(settings):
            return cli.complain(UserError(problem), REFUSED)
        print(settings.run_folder)
        return 0
    if len(argv) < 3 or argv[1] != "--status" or not (argv[2].isdigit() or argv[2] == ENDING):
        raise UserError("requeue decide needs --status N first")
    settings = sources.from_command_line(argv[3:], "requeue decide", ABOUT)
    if argv[2] == ENDING and _acts_outside():
        return 1  # only Slurm knows what it is ending the job for
    refused = _act(settings, None if argv[2] == ENDING else int(argv[2]))
    if refused is None:
        return 1
    print("decided")
    return refused


def job_event(job: Job) -> dict[str, Any]:
    """What the event `job` records of this start; a time that Slurm does not give now is left out."""
    times = {
        "queued_at": scontrol.unix_time(job.fields.get("EligibleTime", "")),
        "started_at": scontrol.unix_time(job.fields.get("StartTime", "")),
    }
    known = {key: moment for key, moment in times.items() if moment is not None}
    return {**known, "hosts": world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))}


def _begin(settings: Config) -> str:
    folder = settings.run_folder
    run_folder.prepare(folder)
    _claim(folder, os.environ)
    job = scontrol.job_id(os.environ)
    if not job:
        return ""
    attempt, newest = world.job_attempt(), restart_history.newest_step(folder / "checkpoints")
    with suppress(OSError):
        if not lease.is_held(folder) or lease.holder_is_gone(folder):
            run_folder.put_aside(folder, attempt)
    problem = requeue_policy.hopeless(restart_history.history(_events(folder), attempt, newest), settings.requeue)
    try:
        run_folder.record(folder, "job", job=attempt, newest_step=newest, **job_event(scontrol.ask(job)))
        if problem:
            run_folder.record(folder, "give_up", job=attempt, reason=problem)
    except OSError as error:  # the disk is full: training can go on all the same
        print(f"warning: {error}", file=sys.stderr, flush=True)
    if problem:
        return f"job {job} is not started once more: {problem}"
    return ""


def _events(folder: Path) -> list[records.Record]:
    try:
        return records.events(folder)
    except OSError as error:  # then nothing is known against this start
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return []


def _claim(folder: Path, env: Mapping[str, str]) -> None:
    """One task of a job array, and no other, may have this folder. Raises UserError for the others."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID", "")
    if not array:
        return
    path = folder / "logs" / f"array_{array}.task"
    atomic.create(path, f"{task}\n".encode())
    owner = path.read_text().strip()
    if owner != task:
        raise UserError(
            f"{folder} is the run folder of task {owner} of this job array, and so not that of task {task}: give each "
            "task its own. '%a' in the arguments stands for the task's number: --run.name sweep-%a --run.seed %a"
        )


def _act(settings: Config, status: int | None) -> int | None:
    """Decide and act; `status` is srun's, None while it still runs. Returns an exit status; None if the job is to come
    back and nothing could be recorded of this start: the batch script then counts.
    """
    folder, attempt, id_ = settings.run_folder, world.job_attempt(), scontrol.job_id(os.environ)
    events = _events(folder)
    if any(event["event"] == "chain" and event.get("job") == attempt for event in events):
        _say(f"no requeue of job {id_}: another one waits behind it already")
        return 0
    job = scontrol.ask(id_, ENDING_S if status is None else ASK_S)
    ends = crash_report.deaths(_read(folder / "logs" / f"{attempt}.srun"))
    blamed = crash_report.blame(ends, crash_report.read(folder, attempt))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    decision = _decision(settings, status, job, restart, events, blamed)
    if decision is None:
        return 0
    barred = run_folder.barred(folder)
    if decision.requeue and barred and not job.node_failed:
        # Each start would count as the first one, without end.
        decision = Decision(False, f"it could not be counted ({decision.why}): {barred}", decision.crashed)
    if decision.crashed or job.node_failed:
        _say(crash_report.report(folder, attempt, blamed, ends))

    before = bad_nodes.listed(job, attempt, events)
    comes_back = decision.requeue or job.restarts > restart
    hosts = _hosts_to_avoid(settings, job, decision, blamed, events, before) if comes_back else []
    # Before the job comes back, which may end this process at once.
    happened = _what_happened(decision, status, job, blamed, hosts)
    if decision.requeue and not happened and not any(event.get("job") == attempt for event in events):
        happened = [{"event": "job"}]  # the disk had no room for it at the start
    uncounted = _record(folder, attempt, happened)
    if uncounted and decision.requeue:
        _say(f"{decision.why}. It could not be counted ({uncounted}): the batch script decides")
        return None
    _say(f"{'requeue' if decision.requeue else 'no requeue'} of job {id_}: {decision.why}")
    patience_s = ENDING_S if status is None else REQUEUE_S
    beside = [*before.persons, *hosts]
    came_back, refused = _bring_back(id_, job, restart, beside, patience_s) if decision.requeue else ({}, 0)
    if comes_back and (hosts or before.own) and "next_job" not in came_back:
        hosts = _exclude(id_, job, before, hosts)
    if hosts:
        _say(f"the next start keeps away from {', '.join(hosts)} ({folder / 'excluded_nodes.json'})")
    what: list[dict[str, Any]] = [{"event": "excluded", "hosts": hosts}] if hosts else []
    if decision.gave_up:
        what.append({"event": "give_up", "reason": decision.why})
    if came_back:
        what.append({"reason": decision.why, **came_back})
    elif not decision.crashed and job.restarts <= restart:  # for hpcgpt.status: this job is over
        what.append({"event": "no_requeue", "reason": decision.why})
    if lost := _record(folder, attempt, what):
        print(f"warning: {lost}", file=sys.stderr, flush=True)
    return refused


def _hosts_to_avoid(
    settings: Config, job: Job, decision: Decision, blamed: Blame | None, events: Sequence[Mapping[str, Any]],
    before: bad_nodes.Listed,
) -> list[str]:  # fmt: skip
    """The nodes that the next start is to keep away from, beside those that a person excluded."""
    by_a_node = bool(blamed and blamed.how == crash_report.NODE_FAILED)
    # Where a rank's program could not even be started, a mount is missing, and the next start would fail there too.
    has_no_program = bool(blamed and blamed.status in (CANNOT_EXECUTE, NOT_FOUND))
    looks = settings.requeue.exclude_bad_nodes or has_no_program
    if not looks and not before.own:
        return []
    bad = bad_nodes.bad_hosts(
        blamed if decision.crashed or by_a_node else None, events, settings.requeue.exclude_factor
    )
    kept = bad_nodes.remember(settings.run_folder, bad if looks else {}, before.handed_over)
    nodes = scontrol.nodes(job.fields.get("Partition", ""))
    # Where Slurm does not say which nodes there are, it is left as it is.
    return bad_nodes.affordable(kept, job, nodes, before.persons) if nodes else list(before.own)


def _what_happened(
    decision: Decision, status: int | None, job: Job, blamed: Blame | None, hosts: Sequence[str]
) -> list[dict[str, Any]]:
    """The events that the next starts count by. `hosts`: those that the next one is to keep away from."""
    by_a_node = bool(blamed and blamed.how == crash_report.NODE_FAILED)
    what: list[dict[str, Any]] = []
    if decision.crashed:
        who = {"rank": blamed.rank, "host": blamed.host} if blamed else {"rank": None, "host": None}
        what.append({"event": "crash", "status": status, "reason": decision.why, **who, "excluded": list(hosts)})
    if job.node_failed or by_a_node:
        what.append({"event": "node_failed", "host": blamed.host if blamed and by_a_node else None})
    return what


def _record(folder: Path, attempt: str, what: Sequence[dict[str, Any]]) -> str:
    """Append events of this start; '' or why that cannot be done."""
    try:
        for fields in what:
            run_folder.record(folder, job=attempt, **fields)
    except OSError as error:
        return str(error)
    return ""


def _decision(
    settings: Config, status: int | None, job: Job, restart: int, events: Sequence[Mapping[str, Any]],
    blamed: Blame | None,
) -> Decision | None:  # fmt: skip
    newest = restart_history.newest_step(settings.run_folder / "checkpoints")
    past = restart_history.history(events, world.job_attempt(), newest)
    if status is None:
        return requeue_policy.decide_early(job, restart, past, settings.requeue)
    ended = run_folder.read_exit(settings.run_folder)
    if ended and ended.attempt != world.job_attempt():
        ended = None
    return requeue_policy.decide(ended, status, job, restart, past, settings.requeue, blamed)


def _bring_back(
    id_: str, job: Job, restart: int, hosts: Sequence[str], patience_s: float
) -> tuple[dict[str, str], int]:
    """Bring the job back. Returns what to record of it, {} if it does not come back, and an exit status."""
    if _acts_outside():
        print("requeue")
        return {"event": "requeue"}, 0
    if not job.batch:
        _say(
            f"job {id_} is an allocation of salloc, which Slurm cannot requeue: run the same command again, here or "
            "in a new one; it goes on from the newest checkpoint"
        )
        return {}, 1
    done = scontrol.run_patiently("scontrol", "requeue", id_, patience_s=patience_s)
    # An answer that was lost on its way is no refusal, and a second job would be one too many.
    if done.returncode == 0 or scontrol.ask(id_).restarts > restart:
        return {"event": "requeue"}, 0
    next_id, problem = next_job.submit(job, os.environ, hosts)
    said = done.stderr.strip()
    if next_id:
        _say(f"Slurm refuses to requeue job {id_} ({said}): job {next_id} waits behind it")
        return {"event": "chain", "next_job": next_id}, 0
    print(
        f"error: Slurm refused to requeue job {id_}: {said}; and to queue another one behind it: {problem}. Submit the "
        f"same command again, it goes on from the newest checkpoint:\n  {next_job.by_hand(job, os.environ, hosts)}",
        file=sys.stderr,
        flush=True,
    )
    return {}, 1


def _acts_outside() -> bool:
    """Does the batch script carry out what is decided here, since Slurm's tools are not here but there?"""
    return os.environ.get("HPCGPT_ACTS") == "1" and shutil.which("scontrol") is None


def _exclude(id_: str, job: Job, before: bad_nodes.Listed, hosts: list[str]) -> list[str]:
    problem = bad_nodes.tell(id_, job, before, hosts)
    if problem:
        _say(f"warning: Slurm would not change what job {id_} keeps away from ({', '.join(hosts)}): {problem}")
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
