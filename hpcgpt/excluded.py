"""Hosts that a run keeps away from, where ``requeue.exclude_bad_nodes`` is set.

The host that a crash report blames, and one whose ranks were much slower than the others, are left out of the
job's next start (ExcNodeList). They are remembered in the run folder, so that it adds up over starts::

    excluded_nodes.json     [{"host": ..., "reason": ..., "time": ...}, ...], the oldest first

A person may edit or remove the file. It holds at most MOST hosts, and the oldest goes first: a node that was
mended gets another chance. And never so many are excluded that the partition has too few nodes left.

No torch in here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcgpt import durable, slurm, world
from hpcgpt.faults import Blame

MOST = 8


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


def remember(run_folder: Path, bad: Mapping[str, str]) -> list[str]:
    """Add hosts to those of earlier starts; all that the run now keeps away from, the oldest first."""
    path = run_folder / "excluded_nodes.json"
    known = [entry for entry in _read(path) if entry["host"] not in bad]
    known += [{"host": host, "reason": why, "time": time.time()} for host, why in bad.items()]
    known = known[-MOST:]
    if bad:
        try:
            durable.write(path, (json.dumps(known, indent=1) + "\n").encode())
        except OSError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
    return [entry["host"] for entry in known]


def affordable(hosts: Sequence[str], job: slurm.Job, nodes: Mapping[str, bool]) -> list[str]:
    """Of `hosts`, the newest that can be excluded with enough usable `nodes` left, beside what is excluded already.

    Whoever asked for certain nodes by name gets them: excluding one of these would keep the job waiting for ever. And
    Slurm refuses all that is asked for together with a name that is none of its nodes: of a host that calls itself
    n1.cluster.org the node is n1, and one that is unknown, or was taken out of the cluster, is passed over.
    """
    asked = world.expand_hosts(job.fields.get("ReqNodeList", "").replace("(null)", ""))
    already = world.expand_hosts(job.fields.get("ExcNodeList", "").replace("(null)", ""))
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


def tell(job_id: str, job: slurm.Job, hosts: Sequence[str]) -> str:
    """Have the requeued, waiting job keep away from `hosts` as well; '' or why Slurm does not do it."""
    already = world.expand_hosts(job.fields.get("ExcNodeList", "").replace("(null)", ""))
    wanted = ",".join(dict.fromkeys([*already, *hosts]))
    done = slurm.run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={wanted}")
    return "" if done.returncode == 0 else done.stderr.strip()


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
        return [{"host": str(entry["host"]), **entry} for entry in found]
    except (OSError, KeyError, TypeError, ValueError):
        return []
