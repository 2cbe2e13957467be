"""Where the drill's runs take place: what the lab (testbed_lab.py) and this machine (testbed_here.py) have in common.

A victim is found by looking into /proc, by its command line and by the variables that its launcher gave to it, and
is signalled through a pidfd: between the look and the shot its number cannot come to mean another process.
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

# What takes minutes in a run of days has to happen in one of a minute.
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
        """False if it has gone."""
        try:
            signal.pidfd_send_signal(self.handle, number)
        except ProcessLookupError:
            return False
        return True


class Place(Protocol):
    """A job is known by the name that `start` gives back."""

    name: str
    kind: Literal["lab", "here"]
    shape: str  # in words
    disk: Disk
    wandb: WandbServer  # every run reports to it

    def version(self) -> str:
        """Slurm's; '' without one."""

    def start(self, run: str, training: Sequence[str], partition: str = "low") -> str: ...

    def state(self, job: str) -> State:
        """ "over" is any end but a finished training."""

    def over(self, job: str) -> bool:
        """Has it ended, in whichever way?"""

    def last_words(self, job: str) -> str:
        """How Slurm (or the drill, where it plays the batch script) says that the job ended, and the log's end."""

    def ranks(self, job: str) -> list[Rank]: ...

    def healthy(self) -> bool:
        """Do all nodes answer?"""

    def cancel_all(self) -> None:
        """End every job that was started here and is still there."""


def ranks_among(pids: Iterable[int], belongs: Mapping[str, str], host: str) -> list[Rank]:
    """The training processes among `pids` that have all the variables in `belongs`, by rank."""
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile
            handle = os.pidfd_open(pid)
            words, env = command_line(pid), environment(pid)
            if _trains(words) and belongs.items() <= env.items():
                found.append(Rank(world.discover(env).rank, pid, host, handle))
            else:
                os.close(handle)
    return sorted(found, key=lambda rank: rank.rank)


def _trains(words: list[str]) -> bool:
    """Not srun, torchrun or a shell, which have the same words among their own."""
    options = [word for word in words[1:4] if word != "-u"]  # torchrun's
    return options[:2] == ["-m", "hpcgpt.train"]


def command_line(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]


def environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


class Disk:
    """The file system that the runs are on. Only one of the drill's own may be filled."""

    def __init__(self, folder: Path, own: bool) -> None:
        self.folder, self.own = folder, own
        self._filler = folder / ".filled-by-the-drill"

    def fill(self) -> None:
        """Leave no room; what is freed meanwhile is taken by the next call."""
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
