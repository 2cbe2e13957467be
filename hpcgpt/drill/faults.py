"""The faults that need no Slurm, each with its name, what it does and what must follow; and the schedule of faults.

The seed decides the schedule: kinds are drawn from shuffled bags, so that all of them occur equally often, and each
fault has its own delay and victim. A fault that finds no victim raises MissedError.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpcgpt.drill.testbed import Rank, Testbed
from hpcgpt.drill.wandb_server import Mode
from hpcgpt.drill.watched_run import CleanupStack, WatchedRun
from hpcgpt.output.counted import counted

# What must follow: "restart": another attempt continues. "on": this attempt continues. "either": one of the two.
Expected = Literal["restart", "on", "either"]


@dataclass(frozen=True)
class ScheduledFault:
    """`pick` and `amount`, both in [0, 1), choose the victim and the extent: the byte, the seconds."""

    kind: str
    delay_s: float
    pick: float
    amount: float


@dataclass
class FaultContext:
    """What a fault works on. `done`: has it happened completely, apart from its cleanup? `checks` are called once steps
    follow, and return what is wrong, or ''."""

    testbed: Testbed
    job: str
    training: Sequence[str]
    run: WatchedRun
    scheduled: ScheduledFault
    cleanup: CleanupStack
    done: Callable[[], bool] = lambda: True
    checks: list[Callable[[], str]] = field(default_factory=list)

    def ranks(self) -> list[Rank]:
        found = self.testbed.ranks(self.job)
        if not found:
            raise MissedError("no rank was there")
        return found

    def victim(self) -> Rank:
        found = self.ranks()
        return found[int(self.scheduled.pick * len(found))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.scheduled.amount


@dataclass(frozen=True)
class FaultKind:
    """`inject` injects the fault and returns a description of the victim. `checkpoints` must exist before. `takes_s`:
    the run may not notice the fault for so long, so at least that much of it must be left."""

    name: str
    about: str
    expected: Expected
    inject: Callable[[FaultContext], str]
    checkpoints: int = 0
    own_disk: bool = False
    takes_s: float = 0.0


class MissedError(Exception):
    """The fault found no victim."""


def draw(seed: int, names: Sequence[str]) -> FaultSchedule:
    return FaultSchedule(random.Random(seed), list(names))


class FaultSchedule:
    """The endless list of faults of a seed. One that cannot be injected yet is put back, and comes next."""

    def __init__(self, generator: random.Random, names: Sequence[str]) -> None:
        self._random, self._names = generator, names
        self._bag: list[str] = []
        self._top: list[ScheduledFault] = []

    def next(self) -> ScheduledFault:
        if self._top:
            return self._top.pop()
        if not self._bag:
            self._bag = list(self._names)
            self._random.shuffle(self._bag)
        return ScheduledFault(
            self._bag.pop(), self._random.uniform(2.0, 8.0), self._random.random(), self._random.random()
        )

    def put_back(self, scheduled: ScheduledFault) -> None:
        self._top.append(scheduled)


# --- processes -------------------------------------------------------------------------------------


def kill_rank(context: FaultContext) -> str:
    rank = context.victim()
    _kill(rank)
    return str(rank)


def kill_all(context: FaultContext) -> str:
    return counted(len(_kill_all(context)), "rank")


def _kill_all(context: FaultContext) -> list[Rank]:
    found = context.ranks()
    for rank in found:
        rank.send(signal.SIGKILL)
    return found


def stop_rank(context: FaultContext) -> str:
    rank, seconds = context.victim(), context.between(3, 10)
    if not rank.send(signal.SIGSTOP):
        raise MissedError(f"{rank} had ended")
    context.cleanup.add(f"SIGCONT to {rank}", lambda: rank.send(signal.SIGCONT), seconds)
    return f"{rank}, {seconds:.0f} s"


def kill_in_save(context: FaultContext, limit_s: float = 60.0) -> str:
    """Send SIGKILL once a checkpoint that is being written has a certain number of bytes."""
    before = context.run.committed()
    expected = _bytes_in(before[-1])
    wanted = int(expected * context.scheduled.amount)
    rank, deadline, look_again_at = context.victim(), time.monotonic() + limit_s, 0.0
    while time.monotonic() < deadline:
        for temporary in context.run.being_saved():
            if (there := _bytes_in(temporary)) >= wanted and there:
                _kill(rank)
                return f"{rank}, at byte {there:,} of {expected:,} of {temporary.name.split('.')[1]}"
        time.sleep(0.0002)
        if time.monotonic() > look_again_at:  # an unexpected restart would have other ranks
            look_again_at = time.monotonic() + 2
            if context.testbed.state(context.job) != "running":
                raise MissedError("the job was no longer running")
    raise MissedError(f"no save was seen at byte {wanted:,} within {limit_s:.0f} s")


def kill_in_start(context: FaultContext) -> str:
    """Send SIGKILL to all ranks, and to one of the next attempt while it imports, connects and resumes."""
    rank, delay_s = _new_rank(context, _kill_all(context)), context.between(0, 4)
    time.sleep(delay_s)
    _kill(rank)
    return f"{rank}, {delay_s:.1f} s after it began"


def _new_rank(context: FaultContext, killed: Sequence[Rank], limit_s: float = 90.0) -> Rank:
    """Wait for a rank of the attempt after the one that was killed."""
    before = {rank.pid for rank in killed}
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = [rank for rank in context.testbed.ranks(context.job) if rank.pid not in before]
        if found:
            return found[int(context.scheduled.pick * len(found))]
        time.sleep(0.05)
    raise MissedError(f"no new rank within {limit_s:.0f} s")


def _kill(rank: Rank) -> None:
    if not rank.send(signal.SIGKILL):
        raise MissedError(f"{rank} had ended")


def _bytes_in(folder: Path) -> int:
    total = 0
    try:
        for path in folder.iterdir():
            total += path.stat().st_size
    except OSError:  # it has been renamed
        return 0
    return total


# --- files -----------------------------------------------------------------------------------------


def truncate(context: FaultContext) -> str:
    def damage(newest: Path) -> str:
        path, size = _a_file(context, newest)
        keep = int(size * context.scheduled.amount)
        with open(path, "rb+") as file:
            file.truncate(keep)
        return f"{path.name} cut to {keep:,} of {size:,} bytes"

    return _damage_and_kill(context, damage)


def flip_bit(context: FaultContext) -> str:
    def damage(newest: Path) -> str:
        path, size = _a_file(context, newest)
        at = int(size * context.scheduled.amount)
        with open(path, "rb+") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))
        return f"bit {at % 8} of byte {at:,} of {path.name}"

    return _damage_and_kill(context, damage)


def remove_manifest(context: FaultContext) -> str:
    def damage(newest: Path) -> str:
        (newest / "manifest.json").unlink()
        return "manifest.json"

    return _damage_and_kill(context, damage)


def _a_file(context: FaultContext, newest: Path) -> tuple[Path, int]:
    files = sorted(newest.iterdir())
    path = files[int(context.scheduled.pick * len(files))]
    return path, path.stat().st_size


def _damage_and_kill(context: FaultContext, damage: Callable[[Path], str]) -> str:
    """Damage the newest checkpoint, and kill all ranks, so that none writes a newer one before it is loaded."""
    found = context.ranks()
    for _ in range(50):
        for rank in found:
            rank.send(signal.SIGSTOP)
        newest = context.run.committed()[-1]
        if not context.run.being_saved():
            break
        for rank in found:
            rank.send(signal.SIGCONT)
        time.sleep(0.1)
    else:
        raise MissedError("there was always a save in progress")
    description = damage(newest)
    for rank in found:
        rank.send(signal.SIGKILL)
    step, attempt = int(newest.name.removeprefix("step_")), context.run.newest_start()

    def quarantined() -> str:
        resumed = [start["step"] for start in context.run.starts() if start["attempt"] > attempt]
        if resumed and resumed[0] >= step:
            return f"{newest.name} was damaged, but the next attempt started at step {resumed[0]:,}"
        if not list(context.run.checkpoints.glob(f"damaged_{newest.name}*")):
            return f"{newest.name} was damaged, but it was not quarantined"
        return ""

    context.checks.append(quarantined)
    return f"{newest.name}: {description}"


def fill_disk(context: FaultContext) -> str:
    """Fill the disk for long enough that a save fails."""
    disk, seconds = context.testbed.disk, context.between(6, 15)
    context.cleanup.add("the disk has room again", disk.empty, seconds)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        disk.fill()  # repeatedly: a save that fails frees its files
        time.sleep(0.05)
    return f"{seconds:.0f} s"


def fill_disk_at_start(context: FaultContext, limit_s: float = 200.0) -> str:
    """Send SIGKILL to all ranks, and keep the disk full until some seconds after the next attempt has its lease. It
    must train nevertheless. (How long a start takes depends on the machine, so its lease is waited for.)
    """
    disk, attempt, seconds = context.testbed.disk, context.run.newest_start(), context.between(6, 12)
    context.cleanup.add("the disk has room again", disk.empty, 0)
    disk.fill()
    killed = kill_all(context)
    deadline, until = time.monotonic() + limit_s, 0.0
    while not until or time.monotonic() < until:
        disk.fill()
        if not until and context.run.newest_lease() > attempt:
            until = time.monotonic() + seconds
        if not until and (context.testbed.over(context.job) or time.monotonic() > deadline):
            context.checks.append(lambda: "no attempt started while the disk was full")
            return f"{killed}, and no attempt started"
        time.sleep(0.05 if until else 0.5)

    def started_once() -> str:
        after = context.run.newest_start()
        return "" if after == attempt + 1 else f"it took {after - attempt} starts, expected one"

    context.checks.append(started_once)
    return f"{killed}, and until {seconds:.0f} s after the next attempt had its lease"


# --- wandb's server --------------------------------------------------------------------------------

OUTAGES: tuple[Mode, ...] = ("silent", "failing", "refusing")


def stop_wandb(context: FaultContext) -> str:
    """Stop the server for a while. Training must not notice."""
    mode, seconds = _stop_wandb(context), context.between(8, 30)
    context.cleanup.add("wandb's server answers again", lambda: _start_wandb(context), seconds)
    return f"{mode}, {seconds:.0f} s"


def stop_wandb_at_start(context: FaultContext) -> str:
    """Send SIGKILL to all ranks during an outage, which lasts until some time after the next attempt has started."""
    before, mode, seconds = context.run.newest_start(), _stop_wandb(context), context.between(8, 20)
    context.cleanup.add("wandb's server answers again", lambda: _start_wandb(context), seconds,
                     lambda: context.run.newest_start() > before and context.run.position()[1] > before)  # fmt: skip
    return f"{mode}, {seconds:.0f} s at least, with {kill_all(context)} killed"


def _stop_wandb(context: FaultContext) -> Mode:
    context.testbed.wandb.mode = mode = OUTAGES[int(context.scheduled.pick * len(OUTAGES))]
    return mode


def _start_wandb(context: FaultContext) -> None:
    context.testbed.wandb.mode = "healthy"


KINDS: tuple[FaultKind, ...] = (
    FaultKind("kill a rank", "SIGKILL to one rank", "restart", kill_rank),
    FaultKind("kill all ranks", "SIGKILL to all ranks at once", "restart", kill_all),
    FaultKind("stop a rank", "SIGSTOP to one rank, SIGCONT 3 to 10 s later", "either", stop_rank),
    FaultKind(
        "kill in a save", "SIGKILL to one rank at a random byte of a save", "restart", kill_in_save, checkpoints=1
    ),
    FaultKind(
        "truncate", "the newest checkpoint loses a file's end; all ranks killed", "restart", truncate, checkpoints=2
    ),
    FaultKind("flip a bit", "one bit of the newest checkpoint; all ranks killed", "restart", flip_bit, checkpoints=2),
    FaultKind(
        "remove a manifest",
        "the newest checkpoint loses its manifest; all ranks killed",
        "restart",
        remove_manifest,
        checkpoints=2,
    ),
    FaultKind(
        "kill in a start", "SIGKILL to all ranks, and to one of the next attempt as it starts", "restart", kill_in_start
    ),
    FaultKind(
        "full disk at the start",
        "SIGKILL to all ranks, and a full disk while the next attempt starts",
        "restart",
        fill_disk_at_start,
        own_disk=True,
    ),
    FaultKind("fill the disk", "a full disk for 6 to 15 s", "on", fill_disk, own_disk=True, takes_s=16),
    FaultKind(
        "wandb outage",
        "the W&B server does not answer, fails or refuses connections for 8 to 30 s",
        "on",
        stop_wandb,
        takes_s=32,
    ),
    FaultKind("wandb outage at the start", "the same, with all ranks killed meanwhile", "restart", stop_wandb_at_start),
)
