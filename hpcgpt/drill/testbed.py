"""The testbed of the drill's runs: what the lab (testbed_lab.py) and this machine (testbed_here.py) have in common.

Ranks are found in /proc, by their command line and by the variables that their launcher gave them, and are signalled
through a pidfd, which cannot mean another process if the pid is reused.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from hpcgpt.distributed import world
from hpcgpt.drill.wandb_server import WandbServer

State = Literal["waiting", "running", "finished", "over"]

# Intervals of minutes are shortened for runs that take a minute.
TRACKING_TIMES = {"HPCGPT_TRACKING_CHECK_S": "20", "HPCGPT_TRACKING_PROBE_S": "10", "HPCGPT_TRACKING_INIT_S": "10"}


@dataclass(frozen=True)
class Rank:
    rank: int
    pid: int
    host: str
    handle: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process has ended."""
        try:
            signal.pidfd_send_signal(self.handle, number)
        except ProcessLookupError:
            return False
        return True


class Testbed(Protocol):
    """Where jobs run. A job is named by the string that `start` returns."""

    name: str
    kind: Literal["lab", "here"]
    shape: str  # a description of nodes and ranks
    disk: Disk
    wandb: WandbServer  # every run reports to it

    def version(self) -> str:
        """Return Slurm's version; '' without Slurm."""

    def start(self, run: str, training: Sequence[str], partition: str = "low") -> str:
        """Start a job that trains the run of that name; returns the job."""

    def state(self, job: str) -> State:
        """Return the job's state; "over" is any end but a finished training."""

    def over(self, job: str) -> bool:
        """Has the job ended?"""

    def failure_details(self, job: str) -> str:
        """Describe how the job ended, with the last lines of its log."""

    def ranks(self, job: str) -> list[Rank]:
        """Find the job's training processes, by rank."""

    def healthy(self) -> bool:
        """Do all nodes answer?"""

    def cancel_all(self) -> None:
        """End every job that was started here and still exists."""


def ranks_among(pids: Iterable[int], belongs: Mapping[str, str], host: str) -> list[Rank]:
    """Find the training processes among `pids` that have all the variables in `belongs`, by rank."""
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            handle = os.pidfd_open(pid)
            command, env = command_line(pid), environment(pid)
            if _trains(command) and belongs.items() <= env.items():
                found.append(Rank(world.discover(env).rank, pid, host, handle))
            else:
                os.close(handle)
    return sorted(found, key=lambda rank: rank.rank)


def _trains(command: list[str]) -> bool:
    """Is it a rank, and not srun, torchrun or a shell, whose arguments contain a rank's command?"""
    options = [argument for argument in command[1:4] if argument != "-u"]  # torchrun adds -u
    return options[:2] == ["-m", "hpcgpt.train"]


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


class Disk:
    """The file system of the runs. It may be filled only if the drill has mounted it (`own`)."""

    def __init__(self, folder: Path, own: bool) -> None:
        self.folder, self.own = folder, own
        self._filler = folder / ".filled-by-the-drill"

    def fill(self) -> None:
        """Use up all free space; what is freed later is used up by the next call."""
        assert self.own, "not our disk"
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (1 << 22, 1 << 16, 1 << 12, 1):
                with suppress(OSError):
                    while os.write(descriptor, bytes(size)):
                        pass
        finally:
            os.close(descriptor)

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)
