"""The faults that hit any run, with Slurm or without: each a name, what it does, and what must come of it.

What the seed decides is drawn beforehand (Planned): kinds come in shuffled bags, so that all of them come
equally often, and each has its own delay and victim. A fault that finds nothing to hit raises MissedError.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hpcgpt.drill.testbed import Place, Rank
from hpcgpt.drill.wandb_server import Mode
from hpcgpt.drill.watched_run import Undoing, Watched

# "restart": another attempt must go on. "on": this attempt must go on. "either": whatever the program and
# Slurm make of it, as long as steps follow.
Expected = Literal["restart", "on", "either"]


@dataclass(frozen=True)
class Planned:
    """`pick` and `much`, both in [0, 1), choose the victim and how much of it: the byte, the seconds."""

    kind: str
    delay_s: float
    pick: float
    much: float


@dataclass
class Scene:
    """Where a fault strikes. `done` says that it has happened to its end, beside what is still to be undone;
    `promises` are asked once steps follow: what is wrong, or ''."""

    place: Place
    job: str
    training: Sequence[str]
    run: Watched
    planned: Planned
    undo: Undoing
    done: Callable[[], bool] = lambda: True
    promises: list[Callable[[], str]] = field(default_factory=list)

    def ranks(self) -> list[Rank]:
        found = self.place.ranks(self.job)
        if not found:
            raise MissedError("no rank was there")
        return found

    def one(self) -> Rank:
        found = self.ranks()
        return found[int(self.planned.pick * len(found))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.planned.much


@dataclass(frozen=True)
class Kind:
    """`hit` strikes and returns the victim in words. `checkpoints`: so many must be there before. `takes_s`: for so
    long the run may go on before it feels anything, so that much of it must be left."""

    name: str
    about: str
    expected: Expected
    hit: Callable[[Scene], str]
    checkpoints: int = 0
    own_disk: bool = False
    takes_s: float = 0.0


class MissedError(Exception):
    """There was nothing to hit."""


def draw(seed: int, names: Sequence[str]) -> Deck:
    return Deck(random.Random(seed), list(names))


class Deck:
    """The endless list of faults of a seed. One that could not be used yet is put back on top."""

    def __init__(self, generator: random.Random, names: Sequence[str]) -> None:
        self._random, self._names = generator, names
        self._bag: list[str] = []
        self._top: list[Planned] = []

    def take(self) -> Planned:
        if self._top:
            return self._top.pop()
        if not self._bag:
            self._bag = list(self._names)
            self._random.shuffle(self._bag)
        return Planned(self._bag.pop(), self._random.uniform(2.0, 8.0), self._random.random(), self._random.random())

    def put_back(self, planned: Planned) -> None:
        self._top.append(planned)


# --- processes -------------------------------------------------------------------------------------


def kill_rank(scene: Scene) -> str:
    rank = scene.one()
    _shoot(rank)
    return str(rank)


def kill_all(scene: Scene) -> str:
    return f"{len(_kill_all(scene))} ranks"


def _kill_all(scene: Scene) -> list[Rank]:
    found = scene.ranks()
    for rank in found:
        rank.send(signal.SIGKILL)
    return found


def stop_rank(scene: Scene) -> str:
    rank, seconds = scene.one(), scene.between(3, 10)
    if not rank.send(signal.SIGSTOP):
        raise MissedError(f"{rank} had gone")
    scene.undo.later(f"SIGCONT to {rank}", lambda: rank.send(signal.SIGCONT), seconds)
    return f"{rank}, {seconds:.0f} s"


def kill_in_save(scene: Scene, limit_s: float = 60.0) -> str:
    """SIGKILL once a checkpoint that is being written has a certain number of bytes."""
    before = scene.run.committed()
    expected = _bytes_in(before[-1])
    wanted = int(expected * scene.planned.much)
    rank, deadline, look_again_at = scene.one(), time.monotonic() + limit_s, 0.0
    while time.monotonic() < deadline:
        for temporary in scene.run.being_saved():
            if (there := _bytes_in(temporary)) >= wanted and there:
                _shoot(rank)
                return f"{rank}, at byte {there:,} of {expected:,} of {temporary.name.split('.')[1]}"
        time.sleep(0.0002)
        if time.monotonic() > look_again_at:  # the ranks are others after a restart that nobody asked for
            look_again_at = time.monotonic() + 2
            if scene.place.state(scene.job) != "running":
                raise MissedError("the job was not running any more")
    raise MissedError(f"no save was seen at byte {wanted:,} within {limit_s:.0f} s")


def kill_in_start(scene: Scene) -> str:
    """SIGKILL to all ranks, and to one of the next attempt while it loads, meets and resumes."""
    rank, delay_s = _new_rank(scene, _kill_all(scene)), scene.between(0, 4)
    time.sleep(delay_s)
    _shoot(rank)
    return f"{rank}, {delay_s:.1f} s after it began"


def _new_rank(scene: Scene, killed: Sequence[Rank], limit_s: float = 90.0) -> Rank:
    """One rank of the attempt after the one that was killed, as soon as it is there."""
    before = {rank.pid for rank in killed}
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = [rank for rank in scene.place.ranks(scene.job) if rank.pid not in before]
        if found:
            return found[int(scene.planned.pick * len(found))]
        time.sleep(0.05)
    raise MissedError(f"no new rank within {limit_s:.0f} s")


def _shoot(rank: Rank) -> None:
    if not rank.send(signal.SIGKILL):
        raise MissedError(f"{rank} had gone")


def _bytes_in(folder: Path) -> int:
    total = 0
    try:
        for path in folder.iterdir():
            total += path.stat().st_size
    except OSError:  # it has been renamed
        return 0
    return total


# --- files -----------------------------------------------------------------------------------------


def truncate(scene: Scene) -> str:
    def damage(newest: Path) -> str:
        path, size = _a_file(scene, newest)
        keep = int(size * scene.planned.much)
        with open(path, "rb+") as file:
            file.truncate(keep)
        return f"{path.name} cut to {keep:,} of {size:,} bytes"

    return _damage_and_kill(scene, damage)


def flip_bit(scene: Scene) -> str:
    def damage(newest: Path) -> str:
        path, size = _a_file(scene, newest)
        at = int(size * scene.planned.much)
        with open(path, "rb+") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))
        return f"bit {at % 8} of byte {at:,} of {path.name}"

    return _damage_and_kill(scene, damage)


def remove_manifest(scene: Scene) -> str:
    def damage(newest: Path) -> str:
        (newest / "manifest.json").unlink()
        return "manifest.json"

    return _damage_and_kill(scene, damage)


def _a_file(scene: Scene, newest: Path) -> tuple[Path, int]:
    files = sorted(newest.iterdir())
    path = files[int(scene.planned.pick * len(files))]
    return path, path.stat().st_size


def _damage_and_kill(scene: Scene, damage: Callable[[Path], str]) -> str:
    """Damage the newest checkpoint and have it loaded: nobody lives to write a newer one."""
    found = scene.ranks()
    for _ in range(50):
        for rank in found:
            rank.send(signal.SIGSTOP)
        newest = scene.run.committed()[-1]
        if not scene.run.being_saved():
            break
        for rank in found:
            rank.send(signal.SIGCONT)
        time.sleep(0.1)
    else:
        raise MissedError("there was always a save in progress")
    words = damage(newest)
    for rank in found:
        rank.send(signal.SIGKILL)
    step, attempt = int(newest.name.removeprefix("step_")), scene.run.newest_start()

    def set_aside() -> str:
        resumed = [start["step"] for start in scene.run.starts() if start["attempt"] > attempt]
        if resumed and resumed[0] >= step:
            return f"{newest.name} was damaged, and the next attempt started at step {resumed[0]:,}"
        if not list(scene.run.checkpoints.glob(f"damaged_{newest.name}*")):
            return f"{newest.name} was damaged, and it was not set aside"
        return ""

    scene.promises.append(set_aside)
    return f"{newest.name}: {words}"


def fill_disk(scene: Scene) -> str:
    """Long enough for a save to fail."""
    disk, seconds = scene.place.disk, scene.between(6, 15)
    scene.undo.later("the disk has room again", disk.empty, seconds)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        disk.fill()  # again and again: a save that failed gives back what it had taken
        time.sleep(0.05)
    return f"{seconds:.0f} s"


def fill_disk_at_start(scene: Scene, limit_s: float = 200.0) -> str:
    """SIGKILL to all ranks, and no byte free until the next attempt has started, and some seconds more. It must train
    all the same. How long a start takes depends on the machine: that it has the run folder is seen by its generation.
    """
    disk, attempt, seconds = scene.place.disk, scene.run.newest_start(), scene.between(6, 12)
    scene.undo.later("the disk has room again", disk.empty, 0)
    disk.fill()
    killed = kill_all(scene)
    deadline, until = time.monotonic() + limit_s, 0.0
    while not until or time.monotonic() < until:
        disk.fill()
        if not until and scene.run.newest_generation() > attempt:
            until = time.monotonic() + seconds
        if not until and (scene.place.over(scene.job) or time.monotonic() > deadline):
            scene.promises.append(lambda: "no attempt started while the disk was full")
            return f"{killed}, and no attempt started"
        time.sleep(0.05 if until else 0.5)

    def started_once() -> str:
        after = scene.run.newest_start()
        return "" if after == attempt + 1 else f"it took {after - attempt} starts, expected one"

    scene.promises.append(started_once)
    return f"{killed}, and until {seconds:.0f} s after the next attempt had the run folder"


# --- wandb's server --------------------------------------------------------------------------------

OUTAGES: tuple[Mode, ...] = ("silent", "failing", "refusing")


def stop_wandb(scene: Scene) -> str:
    """Training must not notice."""
    mode, seconds = _stop_wandb(scene), scene.between(8, 30)
    scene.undo.later("wandb's server answers again", lambda: _start_wandb(scene), seconds)
    return f"{mode}, {seconds:.0f} s"


def stop_wandb_at_start(scene: Scene) -> str:
    """SIGKILL to all ranks during an outage: the next attempt starts without an answer, and some time passes."""
    before, mode, seconds = scene.run.newest_start(), _stop_wandb(scene), scene.between(8, 20)
    scene.undo.later("wandb's server answers again", lambda: _start_wandb(scene), seconds,
                     lambda: scene.run.newest_start() > before and scene.run.position()[1] > before)  # fmt: skip
    return f"{mode}, {seconds:.0f} s at least, with {kill_all(scene)} killed"


def _stop_wandb(scene: Scene) -> Mode:
    scene.place.wandb.mode = mode = OUTAGES[int(scene.planned.pick * len(OUTAGES))]
    return mode


def _start_wandb(scene: Scene) -> None:
    scene.place.wandb.mode = "healthy"


KINDS: tuple[Kind, ...] = (
    Kind("kill a rank", "SIGKILL to one rank", "restart", kill_rank),
    Kind("kill all ranks", "SIGKILL to all ranks at once", "restart", kill_all),
    Kind("stop a rank", "SIGSTOP to one rank, SIGCONT 3 to 10 s later", "either", stop_rank),
    Kind("kill in a save", "SIGKILL to one rank at a random byte of a save", "restart", kill_in_save, checkpoints=1),
    Kind("truncate", "the newest checkpoint loses a file's end; all ranks killed", "restart", truncate, checkpoints=2),
    Kind("flip a bit", "one bit of the newest checkpoint; all ranks killed", "restart", flip_bit, checkpoints=2),
    Kind(
        "remove a manifest",
        "the newest checkpoint loses its manifest; all ranks killed",
        "restart",
        remove_manifest,
        checkpoints=2,
    ),
    Kind(
        "kill in a start", "SIGKILL to all ranks, and to one of the next attempt as it starts", "restart", kill_in_start
    ),
    Kind(
        "full disk at the start",
        "SIGKILL to all ranks, and no byte free while the next attempt starts",
        "restart",
        fill_disk_at_start,
        own_disk=True,
    ),
    Kind("fill the disk", "no byte free for 6 to 15 s", "on", fill_disk, own_disk=True, takes_s=16),
    Kind(
        "wandb outage",
        "W&B's server is silent, fails or refuses connections for 8 to 30 s",
        "on",
        stop_wandb,
        takes_s=32,
    ),
    Kind("wandb outage at the start", "the same, with all ranks killed in it", "restart", stop_wandb_at_start),
)
