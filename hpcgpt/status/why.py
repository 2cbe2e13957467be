"""`hpcgpt status RUN --why`: one line for each attempt, from when it began to what the requeue policy decided.

    #1 11-28 14:05  2h07m  n1 n2   +1,200 to 1,200  the time limit is near -> requeued
    #2 11-28 16:20  1m10s  n1 n3       +0 to 1,200  crash 1 ...: rank 3 on n3 was killed -> requeued, without n3
    -  11-28 16:25     2s  n1 n2       +0           hpcgpt cannot be imported -> given up: ...

The steps are those that the attempt added to the result: without what a later attempt had to repeat.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from hpcgpt.output.counted import counted
from hpcgpt.status.figures import short_span
from hpcgpt.status.history import LEFT


def title(found: dict[str, Any]) -> str:
    """Format a run's state, and the reason for it, unless that only repeats the state."""
    reason = f" ({found['reason']})" if found["reason"] not in ("", found["state"]) else ""
    return f"{found['run']}: {found['state']}{reason}"


def as_text(found: dict[str, Any]) -> str:
    """Format a run's state, and below it its attempts."""
    return "\n".join([title(found), *(f"  {line}" for line in lines(found))])


def lines(found: dict[str, Any]) -> list[str]:
    """Format the history that `run_status.complete` returned, one line for each attempt."""
    entries = found["history"]
    if not entries:
        return ["no attempt yet"]
    rows = [columns(entry) for entry in entries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    right = (2, 4)  # durations and steps
    return [
        "  ".join([
            *(cell.rjust(width) if column in right else cell.ljust(width)
              for column, (cell, width) in enumerate(zip(row, widths, strict=False))),
            row[-1],
        ]).rstrip()
        for row in rows
    ]  # fmt: skip


def columns(entry: dict[str, Any]) -> list[str]:
    """Format an entry of the history: number and start, job, duration, hosts, steps added, step reached, its end."""
    number = f"#{entry['attempt']}" if entry["attempt"] is not None else "-"
    job = f"job {entry['job']}" if entry["job"] else "no job"
    began = time.strftime("%m-%d %H:%M", time.localtime(entry["began_at"]))
    took = short_span(max(0.0, entry["ended_at"] - entry["began_at"]))
    gained = f"+{entry['gained_steps']:,}"
    reached = f"to {entry['from_step'] + entry['gained_steps']:,}" if entry["attempt"] is not None else ""
    back = "".join(f"went back to step {event.get('step', 0):,}; " for event in entry.get("went_back", []))
    return [f"{number} {began}", job, took, compressed(entry["hosts"]) or "?", gained, reached, f"{back}{_end(entry)}"]


def _end(entry: dict[str, Any]) -> str:
    """Describe how an attempt ended, and what was decided then."""
    if entry.get("running"):
        return "running"
    lost = f", {counted(entry['lost_steps'], 'step')} lost" if entry.get("lost_steps") else ""
    reason, why = str(entry["reason"]), str(entry["decision_reason"])
    if entry["decision"] == LEFT and reason == "finished":
        return reason
    # The policy's reason is often the end itself, with a count before it or the step after it.
    if why and (reason.endswith(why) or why.endswith(reason) or why.startswith(reason)):
        reason, why = max(reason, why, key=len), ""
    excluded = (entry["crash"] or {}).get("excluded")
    decided = entry["decision"] + (f", without {compressed(excluded)}" if excluded else "") if entry["decision"] else ""
    return f"{reason}{lost}" + (f" -> {decided}" if decided else "") + (f": {why}" if decided and why else "")


def compressed(hosts: Sequence[str]) -> str:
    """Write a list of hosts as Slurm does: n[1-4,7], login1."""
    numbers: dict[tuple[str, int], list[int]] = {}
    names = []
    for host in dict.fromkeys(hosts):
        if found := re.fullmatch(r"(.*?)(\d+)", host):
            numbers.setdefault((found[1], len(found[2])), []).append(int(found[2]))
        elif host:
            names.append(host)
    for (name, digits), found_numbers in numbers.items():
        parts = _ranges(sorted(found_numbers), digits)
        alone = len(found_numbers) == 1
        names.append(f"{name}{parts}" if alone else f"{name}[{parts}]")
    return ",".join(names)


def _ranges(numbers: Sequence[int], digits: int) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    # Without leading zeros all have the width of their own, and 9 and 10 are in different groups.
    return ",".join("-".join(f"{number:0{digits}d}" for number in part) for part in parts)
