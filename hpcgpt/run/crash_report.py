"""Which rank failed first, on which host, and how: one answer for a crash, in one place.

A rank that ends by an error writes a file of its own, so that no rank's words drown in the others'::

    faults/<attempt>/rank_00003.json          one JSON object, see Fault; attempt is world.job_attempt, or
                                              outside of Slurm world.attempt
    faults/<attempt>/rank_00003.stacks.txt    where its threads stood, if it hung
    faults/<attempt>/report.txt               the crash report, by hpcgpt.requeue

A rank that was killed cannot write. Of those srun tells, in lines like ::

    srun: error: n2: task 3: Killed
    srun: error: n1: tasks 0-1: Exited with exit code 1
    srun: error: Node failure on n3

which the batch script keeps in logs/<attempt>.srun. Whom to blame: ranks that only lost their connection to
another one, and those that srun itself ended after the first failure, are consequences and never blamed.

No torch in here.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpcgpt.distributed import world
from hpcgpt.errors import rank_of
from hpcgpt.storage import atomic

TRACE_LINES = 40
LOG_LINES = 15
NODE_FAILED = "node failed"


@dataclass(frozen=True)
class Fault:
    """A rank's last words. `kind` "lost" says that it ended only because another rank did."""

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
class Death:
    """One line of srun's: tasks that ended badly, in Slurm's words. `late`: after srun had begun to end the rest."""

    host: str
    ranks: tuple[int, ...]
    how: str
    late: bool

    @property
    def status(self) -> int | None:
        found = re.search(r"exit code (\d+)", self.how)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Blame:
    """Who failed first. `status` is the exit status, None if it did not leave by itself."""

    rank: int | None
    host: str
    how: str
    status: int | None
    reason: str = ""
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        who = f"rank {self.rank} on {self.host}" if self.rank is not None else self.host
        return f"{who}: {self.how}" + (f": {self.reason}" if self.reason else "")


def path_of(run_folder: Path, here: world.World) -> Path:
    """This rank's own file."""
    return run_folder / "faults" / (world.job_attempt() or here.attempt) / f"rank_{here.rank:05d}.json"


def write(run_folder: Path, here: world.World, error: BaseException, status: int, step: int | None = None) -> None:
    """This rank ends by `error`: say so in its own file. Never raises OSError: the disk may be what has failed."""
    lost = isinstance(error, ConnectionError) or rank_of(error) not in (None, here.rank)
    trace = "".join(traceback.format_exception(error)).splitlines()
    reason = str(error).strip() or type(error).__name__
    write_words(run_folder, here, status, reason, trace, step, "lost" if lost else "error")


def write_words(
    run_folder: Path, here: world.World, status: int, reason: str, trace: Sequence[str], step: int | None,
    kind: Literal["error", "lost", "hang"],
) -> None:  # fmt: skip
    """The same for what is no exception, such as a hang."""
    fault = Fault(
        here.rank, socket.gethostname(), os.getpid(), status, " ".join(reason.split()), list(trace)[-TRACE_LINES:],
        time.time(), step, kind,
    )  # fmt: skip
    path = path_of(run_folder, here)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, (json.dumps(asdict(fault)) + "\n").encode())
    except OSError as failure:
        print(f"warning: {failure}", file=sys.stderr, flush=True)


def read(run_folder: Path, attempt: str) -> list[Fault]:
    """The faults of an attempt, in the order of their time. Files that are torn or garbage are left out."""
    found = []
    for path in (run_folder / "faults" / attempt).glob("rank_*.json"):
        try:
            fault = Fault(**json.loads(path.read_bytes()))
            ordered = (float(fault.time), int(fault.rank), fault)
        except (OSError, TypeError, ValueError):
            continue
        found.append(ordered)
    return [fault for *_, fault in sorted(found, key=lambda entry: entry[:2])]


def deaths(said: str) -> list[Death]:
    """What srun's stderr tells of tasks and nodes, in its order; anything else in it is passed over."""
    found, late = [], False
    for line in said.splitlines():
        if node := re.search(r"Node failure on (\S+)", line):
            found.append(Death(node[1].rstrip(",.:"), (), NODE_FAILED, late))
        elif task := re.search(r"error: (\S+): tasks? ([\d,-]+): (.+)", line):
            found.append(Death(task[1], tuple(_numbers(task[2])), task[3].strip(), late))
        # Versions differ in which of these they print, and all print one.
        late |= bool(re.search(r"Terminating|Job step aborted|forcing job termination", line))
    return found


def blame(ends: Sequence[Death], faults: Sequence[Fault]) -> Blame | None:
    """Who failed first, of what srun saw and of what the ranks said; None if nobody can be named."""
    for end in ends:
        if end.how == NODE_FAILED:
            return Blame(None, end.host, NODE_FAILED, None)
    said = {fault.rank: fault for fault in faults}
    own = sorted((fault for fault in faults if fault.kind != "lost"), key=lambda fault: fault.time)
    for end in ends:
        # Who only lost its connection may well be gone before the one that it lost.
        ranks = [rank for rank in end.ranks if rank not in said or said[rank].kind != "lost"]
        if (end.late and end.status is None) or not ranks:
            continue
        if end.status is None and not any(rank in said for rank in ranks):
            return Blame(ranks[0], end.host, end.how, None)
        if not own:
            return Blame(ranks[0], end.host, end.how, end.status)
    if own:
        first = own[0]
        how = "hung" if first.kind == "hang" else f"exit status {first.status}"
        return Blame(first.rank, first.host, how, first.status, first.reason, tuple(first.trace))
    return None


def report(run_folder: Path, attempt: str, blamed: Blame | None, ends: Sequence[Death]) -> str:
    """The crash in one place, as text: who, how, and the last lines; also written to report.txt."""
    folder = run_folder / "faults" / attempt
    log = run_folder / "logs" / f"{attempt}.log"
    lines = [f"crash report of {attempt} (kept in {folder / 'report.txt'})"]
    lines += [f"  first to fail: {blamed or 'nobody can be named: neither srun nor a rank left a word'}"]
    if blamed and blamed.trace:
        lines += ["  its last words:", *(f"    {line}" for line in blamed.trace)]
    else:
        tail = _tail(log)
        lines += [f"  it left no word; the last lines of {log}:", *(f"    {line}" for line in tail)] if tail else []
    others = [f"{end.host} {_ranks(end.ranks)}{end.how}" for end in ends]
    lines += [f"  what srun saw, in its order: {'; '.join(others)}"] if others else []
    stacks = sorted(folder.glob("*.stacks.txt"))
    lines += [f"  stacks: {', '.join(str(path) for path in stacks)}"] if stacks else []
    text = "\n".join(lines)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write(folder / "report.txt", (text + "\n").encode())
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)
    return text


def _numbers(text: str) -> list[int]:
    """Slurm's '0-2,5' as 0, 1, 2, 5."""
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
