"""Hosts that a run keeps away from, where ``requeue.exclude_bad_nodes`` is set.

The host that a crash report blames, and one whose ranks were much slower than the others, are left out of the
job's next start (ExcNodeList). They are remembered in the run folder, so that it adds up over starts::

    excluded_nodes.json     [{"host": ..., "reason": ..., "time": ...}, ...], the oldest first

A person may edit or remove the file. It holds at most MOST hosts, and the oldest goes first; what is older than KEEP_S
is left out, so a node that was mended gets another chance. An entry without a time is a person's, and stays. And never
so many are excluded that the partition has too few nodes left.

Slurm's own list, ExcNodeList, does not say who put a host there. What a person asked for stays there. What this program
put there is known from the event ``excluded`` of the same chain of jobs, and, of slurm/pretrain.sbatch, from the job's
comment (hpcgpt_avoid=HOST,HOST): each time that the job comes back, what is remembered then takes the place of these.

No torch in here.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.distributed import world
from hpcgpt.run.crash_report import Blame
from hpcgpt.slurm import restart_history, scontrol
from hpcgpt.storage import atomic

AVOID = "hpcgpt_avoid="  # in a job's comment
MOST = 8
# A broken node is drained, mended or replaced within days. One that is blamed again costs one more start.
KEEP_S = 7 * 86_400.0


def bad_hosts(blamed: Blame | None, events: Sequence[Mapping[str, Any]], factor: float) -> dict[str, str]:
    """Host -> why it is bad: the one to blame for a crash, and the stragglers of the newest start."""
    found: dict[str, str] = {}
    newest = max((place for place, event in enumerate(events) if event["event"] == "start"), default=-1)
    for event in events[newest + 1 :]:
        if event["event"] == "straggler" and event.get("factor", 0) >= factor and event.get("host"):
            found[event["host"]] = f"steps took {event['factor']:.1f} times as long as usual"
    if blamed:
        found[blamed.host] = blamed.how
    return found


def remember(run_folder: Path, bad: Mapping[str, str], handed_over: Sequence[str] = ()) -> list[str]:
    """Add hosts to those of earlier starts; all that the run now keeps away from, the oldest first.

    Those that are `handed_over` by slurm/pretrain.sbatch are added if they are not known yet.
    """
    path, now = run_folder / "excluded_nodes.json", time.time()
    read = _read(path)
    known = [entry for entry in read if entry["host"] not in bad and not _is_old(entry, now)]
    new = {host: "a start failed there" for host in handed_over if all(host != entry["host"] for entry in read)}
    known += [{"host": host, "reason": why, "time": now} for host, why in {**new, **bad}.items()]
    known = known[-MOST:]
    if known != read:
        try:
            atomic.write(path, (json.dumps(known, indent=1) + "\n").encode())
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    return [entry["host"] for entry in known]


@dataclass(frozen=True)
class Listed:
    """The hosts of a job's ExcNodeList: those that a person asked for, and this program's `own`, of which
    slurm/pretrain.sbatch put those there by itself that are `handed_over`.
    """

    persons: tuple[str, ...]
    own: tuple[str, ...]
    handed_over: tuple[str, ...]


def listed(job: scontrol.Job, attempt: str, events: Sequence[Mapping[str, Any]]) -> Listed:
    """What the job is kept away from now. `attempt` is world.job_attempt, '<id>_<restart>'."""
    by_script = _avoided(job)
    chain = restart_history.chain_of(events, attempt)
    told = set(by_script)
    for event in events:
        # Earlier versions recorded them with a crash only.
        key = {"excluded": "hosts", "crash": "excluded"}.get(str(event.get("event")), "")
        if str(event.get("job", "")).rpartition("_")[0] in chain:
            told |= set(event.get(key, ()))
    hosts = world.expand_hosts(job.fields.get("ExcNodeList", "").replace("(null)", ""))
    return Listed(
        tuple(host for host in hosts if host not in told),
        tuple(host for host in hosts if host in told),
        tuple(host for host in by_script if host in hosts),
    )


def affordable(hosts: Sequence[str], job: scontrol.Job, nodes: Mapping[str, bool], already: Sequence[str]) -> list[str]:
    """Of `hosts`, the newest that can be excluded with enough usable `nodes` left, beside a person's, `already`.

    Nodes that were asked for by name are kept: excluding one of these would keep the job waiting for ever. And
    Slurm refuses all that is asked for together with a name that is none of its nodes: of a host that calls itself
    n1.cluster.org the node is n1, and one that is unknown, or was taken out of the cluster, is passed over.
    """
    asked = world.expand_hosts(job.fields.get("ReqNodeList", "").replace("(null)", ""))
    needed = int(job.fields.get("NumNodes", "1").split("-")[0])
    free = {name for name, usable in nodes.items() if usable} - set(already)
    chosen: list[str] = []
    for said in reversed(hosts):
        host = said if said in nodes else said.split(".")[0]
        if (
            host not in nodes
            or host in chosen
            or host in asked
            or host in already
            or (host in free and len(free) - 1 < needed)
        ):
            continue
        free.discard(host)
        chosen.append(host)
    return chosen


def tell(job_id: str, job: scontrol.Job, before: Listed, hosts: Sequence[str]) -> str:
    """Have the requeued, waiting job keep away from `hosts`, and of those `before` only from what a person asked for;
    '' or why Slurm does not do it.
    """
    wanted = dict.fromkeys([*before.persons, *hosts])
    if set(wanted) != {*before.persons, *before.own}:
        done = scontrol.run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(wanted)}")
        if done.returncode:
            return done.stderr.strip()
    if AVOID in job.fields.get("Comment", ""):  # they are remembered in the run folder from now on
        comment = re.sub(rf" ?{AVOID}\S*", "", job.fields.get("Comment", "")).strip()
        scontrol.run("scontrol", "update", f"JobId={job_id}", f"Comment={comment}")
    return ""


def _avoided(job: scontrol.Job) -> list[str]:
    """The hosts that slurm/pretrain.sbatch has excluded by itself."""
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
