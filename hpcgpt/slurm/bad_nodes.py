"""Bad nodes: the hosts that a run avoids if ``requeue.exclude_bad_nodes`` is set.

The host of a crash's first failure, and one whose ranks were much slower than the others, are excluded from the job's
next start (ExcNodeList). The run folder keeps the list, so that it grows over starts::

    excluded_nodes.json     [{"host": ..., "reason": ..., "time": ...}, ...], the oldest first

You may edit or remove the file. It has at most MOST hosts, the newest ones. Entries older than KEEP_S are dropped, so
that a repaired node is used again; an entry without a time was added by a user, and stays. Hosts are excluded only
while the partition has enough nodes left.

Slurm's list, ExcNodeList, does not say where an entry comes from. What the user excluded stays. What this program
added is known from the event ``excluded`` of the same chain of jobs, and what slurm/pretrain.sbatch added from the
job's comment (hpcgpt_avoid=HOST,HOST): at each requeue these are replaced by the list in the run folder.

No torch in here.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.distributed import world
from hpcgpt.output import streams
from hpcgpt.run.crash_report import FirstFailure
from hpcgpt.slurm import restart_history, scontrol
from hpcgpt.storage import atomic

AVOID = "hpcgpt_avoid="  # in a job's comment
MOST = 8
# A broken node is drained, repaired or replaced within days. If it is still broken then, that costs one more start.
KEEP_S = 7 * 86_400.0


def bad_hosts(failure: FirstFailure | None, events: Sequence[Mapping[str, Any]], factor: float) -> dict[str, str]:
    """Return host -> reason for the host of the first failure, and for the stragglers of the newest start."""
    found: dict[str, str] = {}
    newest = max((index for index, event in enumerate(events) if event["event"] == "start"), default=-1)
    for event in events[newest + 1 :]:
        if event["event"] == "straggler" and event.get("factor", 0) >= factor and event.get("host"):
            found[event["host"]] = f"steps took {event['factor']:.1f} times as long as usual"
    if failure:
        found[failure.host] = failure.how
    return found


def update_list(run_folder: Path, bad: Mapping[str, str], by_batch_script: Sequence[str] = ()) -> list[str]:
    """Add `bad` hosts to excluded_nodes.json, and return all in it, the oldest first.

    Hosts that slurm/pretrain.sbatch has excluded are added if they are not in the file yet.
    """
    path, now = run_folder / "excluded_nodes.json", time.time()
    read = _read(path)
    known = [entry for entry in read if entry["host"] not in bad and not _is_old(entry, now)]
    new = {host: "a start failed there" for host in by_batch_script if all(host != entry["host"] for entry in read)}
    known += [{"host": host, "reason": why, "time": now} for host, why in {**new, **bad}.items()]
    known = known[-MOST:]
    if known != read:
        try:
            atomic.write(path, (json.dumps(known, indent=1) + "\n").encode())
        except OSError as error:
            streams.warn(error)
    return [entry["host"] for entry in known]


@dataclass(frozen=True)
class ExcludedNodes:
    """The hosts of a job's ExcNodeList: those that the user excluded, and this program's `own`. Of the latter
    `by_batch_script` are those that slurm/pretrain.sbatch excluded.
    """

    by_user: tuple[str, ...]
    own: tuple[str, ...]
    by_batch_script: tuple[str, ...]


def excluded_nodes(job: scontrol.Job, job_start: str, events: Sequence[Mapping[str, Any]]) -> ExcludedNodes:
    """Return the nodes that the job avoids now. `job_start` is world.job_start, '<id>_<restart>'."""
    by_batch_script = _avoided(job)
    chain = restart_history.chain_of(events, job_start)
    own = set(by_batch_script)
    for event in events:
        # Earlier versions recorded them only in the event of a crash.
        key = {"excluded": "hosts", "crash": "excluded"}.get(str(event.get("event")), "")
        if str(event.get("job", "")).rpartition("_")[0] in chain:
            own |= set(event.get(key, ()))
    hosts = world.expand_hosts(job.fields.get("ExcNodeList", "").replace("(null)", ""))
    return ExcludedNodes(
        tuple(host for host in hosts if host not in own),
        tuple(host for host in hosts if host in own),
        tuple(host for host in by_batch_script if host in hosts),
    )


def excludable_nodes(
    hosts: Sequence[str], job: scontrol.Job, nodes: Mapping[str, bool], by_user: Sequence[str]
) -> list[str]:
    """Return the newest of `hosts` that can be excluded, beside those `by_user`, with enough usable `nodes` left.

    Nodes that the job asks for by name are not excluded: it would wait forever. Slurm refuses a whole list if one name
    in it is not a node: for a host called n1.cluster.org the node is n1, and hosts that are unknown, or no longer in
    the cluster, are left out.
    """
    asked = world.expand_hosts(job.fields.get("ReqNodeList", "").replace("(null)", ""))
    needed = int(job.fields.get("NumNodes", "1").split("-")[0])
    free = {name for name, usable in nodes.items() if usable} - set(by_user)
    chosen: list[str] = []
    for name in reversed(hosts):
        host = name if name in nodes else name.split(".")[0]
        if (
            host not in nodes
            or host in chosen
            or host in asked
            or host in by_user
            or (host in free and len(free) - 1 < needed)
        ):
            continue
        free.discard(host)
        chosen.append(host)
    return chosen


def exclude(job_id: str, job: scontrol.Job, before: ExcludedNodes, hosts: Sequence[str]) -> str:
    """Replace this program's entries in the ExcNodeList of the requeued job by `hosts`. Returns '' or Slurm's error."""
    wanted = dict.fromkeys([*before.by_user, *hosts])
    if set(wanted) != {*before.by_user, *before.own}:
        done = scontrol.run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(wanted)}")
        if done.returncode:
            return done.stderr.strip()
    if AVOID in job.fields.get("Comment", ""):  # from now on the run folder has them
        comment = re.sub(rf" ?{AVOID}\S*", "", job.fields.get("Comment", "")).strip()
        scontrol.run("scontrol", "update", f"JobId={job_id}", f"Comment={comment}")
    return ""


def _avoided(job: scontrol.Job) -> list[str]:
    """Return the hosts that slurm/pretrain.sbatch has excluded."""
    found = re.search(rf"(?:^| ){AVOID}(\S+)", job.fields.get("Comment", ""))
    return found[1].split(",") if found else []


def _is_old(entry: Mapping[str, Any], now: float) -> bool:
    moment = entry.get("time")
    return isinstance(moment, int | float) and now - moment > KEEP_S


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
        return [{"host": str(entry["host"]), **entry} for entry in found]
    except (OSError, KeyError, TypeError, ValueError):
        return []
