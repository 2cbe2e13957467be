"""The crash report: which rank failed first, on which host, and how.

A rank that ends with an error writes a file of its own, so that the ranks' messages do not mix::

    faults/<attempt>/rank_00003.json          one JSON object, see Fault; attempt is world.job_start, or
                                              outside of Slurm world.attempt
    faults/<attempt>/rank_00003.stacks.txt    the stacks of its threads, if it hung
    faults/<attempt>/report.txt               the crash report, written by hpcgpt.requeue

A rank that was killed cannot write one. srun reports such ranks, in lines like ::

    srun: error: n2: task 3: Killed
    srun: error: n1: tasks 0-1: Exited with exit code 1
    srun: error: Node failure on n3

which the batch script keeps in logs/<attempt>.srun. Ranks that only lost their connection to another rank, and ranks
that srun ended after the first failure, never count as the first failure.

No torch in here.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpcgpt.distributed import world
from hpcgpt.errors import rank_of
from hpcgpt.output import streams
from hpcgpt.storage import atomic

TRACE_LINES = 40
LOG_LINES = 15
NODE_FAILED = "node failed"


@dataclass(frozen=True)
class Fault:
    """What a rank wrote when it ended with an error. `kind` "lost": it ended only because another rank did."""

    rank: int
    host: str
    pid: int
    status: int
    reason: str
    trace: list[str]
    time: float
    step: int | None
    kind: Literal["error", "lost", "hang"]


@dataclass(frozen=True)
class TaskExit:
    """Tasks that srun reports as failed, or, without ranks, a failed node. `how` is Slurm's message.

    `late`: srun reported it after it had begun to end the other tasks.
    """

    host: str
    ranks: tuple[int, ...]
    how: str
    late: bool

    @property
    def node_failed(self) -> bool:
        return not self.ranks

    @property
    def status(self) -> int | None:
        found = re.search(r"exit code (\d+)", self.how)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class FirstFailure:
    """The first failure of an attempt.

    `rank` is None if a node failed; `status` is the rank's exit status, None if it was killed.
    """

    rank: int | None
    host: str
    how: str
    status: int | None
    reason: str = ""
    trace: tuple[str, ...] = ()

    @property
    def node_failed(self) -> bool:
        return self.rank is None

    def __str__(self) -> str:
        where = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        return f"{where}: {self.how}" + (f": {self.reason}" if self.reason else "")


def path_of(run_folder: Path, here: world.World) -> Path:
    """Return the path of this rank's file."""
    return run_folder / "faults" / (world.job_start() or here.attempt) / f"rank_{here.rank:05d}.json"


def write(run_folder: Path, here: world.World, error: BaseException, status: int, step: int | None = None) -> None:
    """Write this rank's file because it ends with `error`. Never raises OSError: the disk may be what has failed."""
    lost = isinstance(error, ConnectionError) or rank_of(error) not in (None, here.rank)
    trace = "".join(traceback.format_exception(error)).splitlines()
    reason = str(error).strip() or type(error).__name__
    write_message(run_folder, here, status, reason, trace, step, "lost" if lost else "error")


def write_message(
    run_folder: Path, here: world.World, status: int, reason: str, trace: Sequence[str], step: int | None,
    kind: Literal["error", "lost", "hang"],
) -> None:  # fmt: skip
    """Write this rank's file for a failure that is not an exception, such as a hang."""
    fault = Fault(
        here.rank, socket.gethostname(), os.getpid(), status, " ".join(reason.split()), list(trace)[-TRACE_LINES:],
        time.time(), step, kind,
    )  # fmt: skip
    path = path_of(run_folder, here)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, (json.dumps(asdict(fault)) + "\n").encode())
    except OSError as failure:
        streams.warn(failure)


def read(run_folder: Path, attempt: str) -> list[Fault]:
    """Read the faults of an attempt, ordered by time. Damaged files are left out."""
    found = []
    for path in (run_folder / "faults" / attempt).glob("rank_*.json"):
        try:
            fault = Fault(**json.loads(path.read_bytes()))
            ordered = (float(fault.time), int(fault.rank), fault)
        except (OSError, TypeError, ValueError):
            continue
        found.append(ordered)
    return [fault for *_, fault in sorted(found, key=lambda entry: entry[:2])]


def task_exits(srun_output: str) -> list[TaskExit]:
    """Parse the failed tasks and nodes that srun's stderr reports, in its order; other lines are skipped."""
    found, late = [], False
    for line in srun_output.splitlines():
        if node := re.search(r"Node failure on (\S+)", line):
            found.append(TaskExit(node[1].rstrip(",.:"), (), NODE_FAILED, late))
        elif task := re.search(r"error: (\S+): tasks? ([\d,-]+): (.+)", line):
            found.append(TaskExit(task[1], tuple(_numbers(task[2])), task[3].strip(), late))
        # Each version of Slurm prints one of these.
        late |= bool(re.search(r"Terminating|Job step aborted|forcing job termination", line))
    return found


def first_failure(exits: Sequence[TaskExit], faults: Sequence[Fault]) -> FirstFailure | None:
    """Find the first failure in what srun reported and the ranks wrote; None if neither names one."""
    for end in exits:
        if end.node_failed:
            return FirstFailure(None, end.host, NODE_FAILED, None)
    by_rank = {fault.rank: fault for fault in faults}
    own = sorted((fault for fault in faults if fault.kind != "lost"), key=lambda fault: fault.time)
    for end in exits:
        # A rank that lost its connection may end before the rank at the other end of it.
        ranks = [rank for rank in end.ranks if rank not in by_rank or by_rank[rank].kind != "lost"]
        if (end.late and end.status is None) or not ranks:
            continue
        if end.status is None and not any(rank in by_rank for rank in ranks):
            return FirstFailure(ranks[0], end.host, end.how, None)
        if not own:
            return FirstFailure(ranks[0], end.host, end.how, end.status)
    if own:
        first = own[0]
        how = "hung" if first.kind == "hang" else f"exit status {first.status}"
        return FirstFailure(first.rank, first.host, how, first.status, first.reason, tuple(first.trace))
    return None


def report(run_folder: Path, attempt: str, first: FirstFailure | None, exits: Sequence[TaskExit]) -> str:
    """Compose the crash report, and write it to report.txt: the first failure, and its traceback or last lines."""
    folder = run_folder / "faults" / attempt
    log = run_folder / "logs" / f"{attempt}.log"
    lines = [f"crash report of {attempt} (kept in {folder / 'report.txt'})"]
    lines += [f"  first to fail: {first or 'unknown: neither srun nor a rank reported an error'}"]
    if first and first.trace:
        lines += ["  its traceback:", *(f"    {line}" for line in first.trace)]
    else:
        tail = _tail(log)
        lines += [f"  no traceback; the last lines of {log}:", *(f"    {line}" for line in tail)] if tail else []
    others = [f"{end.host} {_ranks(end.ranks)}{end.how}" for end in exits]
    lines += [f"  what srun reported, in its order: {'; '.join(others)}"] if others else []
    stacks = sorted(folder.glob("*.stacks.txt"))
    lines += [f"  stacks: {', '.join(str(path) for path in stacks)}"] if stacks else []
    text = "\n".join(lines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / "report.txt", (text + "\n").encode())
    except OSError as error:
        streams.warn(error)
    return text


def _numbers(text: str) -> list[int]:
    """Parse Slurm's '0-2,5' as 0, 1, 2, 5."""
    found: list[int] = []
    for part in text.strip(",-").split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}: " if ranks else ""


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 16384))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []
