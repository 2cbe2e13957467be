"""One writer: of all attempts at a run, only the newest may publish.

After a node failure the old ranks can still be alive, training and writing, while the requeued job runs
on other nodes. Locks do not help: many network file systems do not keep them. So each attempt takes the
next generation number before it does anything::

    generations/000003.json    who took it (host, process, attempt, time); made by a link, so exactly once
    generations/000003.alive   a counter that its holder writes every HEARTBEAT_S seconds, and its time
    generations/000003.done    it left in peace

A holder that finds a higher number leaves at once: its heartbeat looks every few seconds, and
``Generation.check`` before each commit. A newcomer that finds a holder watches the counter: if it moves
the holder is alive, and the newcomer says who it is and leaves. Only counters are compared, never
clocks of different hosts. An attempt of the same Slurm job with a higher restart count does not need
to watch: Slurm itself has ended, or given up on, the one before. Nor where the holder's process is gone, which is
known of processes of one kernel and one pid namespace only: in another container of the same host name its number
says nothing.

What is relied on: that opening a folder, or a file, asks the server whether it is still as it is remembered. NFS
clients do that (close-to-open consistency, unless mounted with `nocto`), also for folders, where everything else may
be answered from a cache for a minute. So `_newest` opens the folder for each look, and counters are opened to be read.

A full disk must not keep a run from going on: a number's name is what counts, its file may be empty; the time of the
counter's file moves where the counter cannot be written.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.errors import UserError
from hpcgpt.exit_codes import SUPERSEDED
from hpcgpt.output import streams
from hpcgpt.storage import atomic

HEARTBEAT_S = 2.0
WATCH_S = 5 * HEARTBEAT_S
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TAKEN = re.compile(r"\d+\.json")


@dataclass
class Generation:
    """The number that this process holds. Rank 0 alone has one."""

    folder: Path
    number: int
    _stop: threading.Event

    def superseded_by(self) -> int | None:
        """A higher number, if somebody took one."""
        newest = _newest(self.folder)
        return newest if newest > self.number else None

    def check(self) -> None:
        """Leave the process, now, if a newer attempt has taken the folder."""
        newer = self.superseded_by()
        if newer is not None:
            print(
                f"error: generation {newer} has taken this folder: this attempt (generation {self.number}, "
                f"{socket.gethostname()} pid {os.getpid()}) leaves without writing another byte",
                file=sys.stderr,
                flush=True,
            )
            streams.drain()
            # Not sys.exit: the main thread may hang in a collective with ranks that are gone.
            os._exit(SUPERSEDED)

    def release(self) -> None:
        """Say that this attempt has left in peace: the next one need not watch."""
        self._stop.set()
        try:
            atomic.write(self.folder / f"{self.number:06d}.done", b"")
        except OSError as error:
            # The next one then watches for a few seconds, or sees that this process is gone.
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        while not self._stop.wait(5 * HEARTBEAT_S):
            with suppress(OSError):
                self.check()

    def _beat(self) -> None:
        path = self.folder / f"{self.number:06d}.alive"
        beats = 0
        while not self._stop.wait(HEARTBEAT_S):
            beats += 1
            try:
                self.check()
                _write_beat(path, beats)
            except OSError as error:
                # A full or hanging disk must not end the run; at worst a newcomer takes over.
                print(f"warning: no heartbeat: {error}", file=sys.stderr, flush=True)


def watch(run_folder: Path, number: int) -> None:
    """Leave this process as soon as a newer attempt than `number` has the folder.

    For the ranks that hold no generation: if rank 0's node is the one that failed, nobody else tells them.
    """
    mine = Generation(run_folder / "generations", number, threading.Event())
    threading.Thread(target=mine._look, name="generation", daemon=True).start()


def take(run_folder: Path, attempt: str) -> Generation:
    """The next generation of a run folder. `attempt` is world.job_attempt: '<job>_<restart>' or ''.

    Raises:
        UserError: another attempt holds the folder and is alive, or took it at the same moment.
    """
    folder = run_folder / "generations"
    folder.mkdir(parents=True, exist_ok=True)
    newest = wait_until_gone(run_folder, attempt)
    number = newest + 1
    who = {"host": socket.gethostname(), "attempt": attempt, "time": time.time(), **_process(os.getpid())}
    if not atomic.claim(folder / f"{number:06d}.json", json.dumps(who).encode()):
        raise UserError(f"{run_folder} was taken by another job at this very moment: {_who(folder, number)}")
    generation = Generation(folder, number, threading.Event())
    threading.Thread(target=generation._beat, name="heartbeat", daemon=True).start()
    return generation


def is_held(run_folder: Path) -> bool:
    """Did somebody take this run folder who has not said since that he left?"""
    folder = run_folder / "generations"
    newest = _newest(folder)
    return newest > 0 and not (folder / f"{newest:06d}.done").exists()


def holder_is_gone(run_folder: Path) -> bool:
    """Is the process that took the newest number known to have ended? That of another host or container is not."""
    folder = run_folder / "generations"
    try:
        return _is_known_to_be_gone(_holder(folder, _newest(folder)))
    except (OSError, KeyError, TypeError, OverflowError, RecursionError):  # its file is away, or damaged
        return False


def wait_until_gone(run_folder: Path, attempt: str) -> int:
    """The newest generation of a run folder, whose holder is gone; 0 if there was none yet.

    Raises:
        UserError: its holder is alive.
    """
    folder = run_folder / "generations"
    number = _newest(folder)
    if not number:
        return 0
    holder = _holder(folder, number)
    if (folder / f"{number:06d}.done").exists() or _is_next_start(holder.get("attempt", ""), attempt):
        return number
    if _is_known_to_be_gone(holder):
        return number
    print(f"{_who(folder, number)} did not say that it left: watching it for {WATCH_S:.0f} s", flush=True)
    before = _beats(folder, number)
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 4)
        if _beats(folder, number) != before:
            raise UserError(
                f"{folder.parent} is held by {_who(folder, number)}, which is alive: end it first, or give "
                "this run another --run.name"
            )
        if (folder / f"{number:06d}.done").exists():
            break
    return number


def _is_next_start(before: str, now: str) -> bool:
    """Is `now` a later start of the same Slurm job as `before`?"""
    job, _, restart = before.rpartition("_")
    new_job, _, new_restart = now.rpartition("_")
    return bool(job) and job == new_job and int(new_restart) > int(restart)


def _process(pid: int) -> dict[str, Any]:
    """What tells a process of this host from every other one: its number, kernel, pid namespace and time of start.

    Without /proc the number has to do. Some containers hide the kernel's id: `boot` is None then, which equals no
    other. Raises OSError where there is no such process.
    """
    if not Path("/proc/self/stat").exists():
        return {"pid": pid, "boot": "", "pid_namespace": 0, "began": 0}
    boot: str | None = None
    with suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    # The name before it may have spaces and brackets. The fields are numbers, and the 22nd is the time of start.
    began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return {"pid": pid, "boot": boot, "pid_namespace": os.stat("/proc/self/ns/pid").st_ino, "began": began}


def _is_known_to_be_gone(holder: dict[str, Any]) -> bool:
    """Has the process ended that took a number? That can be known of those of this kernel and pid namespace only."""
    here = {"host": socket.gethostname(), **_process(os.getpid())}
    if here["boot"] is None or any(holder.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return False
    if not _runs(holder["pid"]):
        return True
    try:
        return bool(_process(holder["pid"])["began"] != holder["began"])
    except OSError:  # ended just now, or /proc hides other users' processes
        return False


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _newest(folder: Path) -> int:
    # Not by glob, which takes a folder that cannot be read for an empty one.
    try:
        return max((int(name[:-5]) for name in os.listdir(folder) if _TAKEN.fullmatch(name)), default=0)
    except FileNotFoundError:
        return 0


def _holder(folder: Path, number: int) -> dict[str, Any]:
    """Who took a number; {} if it could not say: its disk was full, or it is about to."""
    try:
        found = json.loads((folder / f"{number:06d}.json").read_bytes())
    except ValueError:
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _who(folder: Path, number: int) -> str:
    holder = _holder(folder, number)
    if not {"host", "pid"} <= holder.keys():
        return f"generation {number}"
    job = f"Slurm job {holder['attempt'].rpartition('_')[0]}, " if holder.get("attempt") else ""
    return f"generation {number} ({job}host {holder['host']}, pid {holder['pid']})"


def _write_beat(path: Path, beats: int) -> None:
    """In its place: emptied first it could not be filled again on a full disk, and its holder would look dead."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.utime(descriptor)  # needs no room
        os.pwrite(descriptor, b"%012d\n" % beats, 0)
    finally:
        os.close(descriptor)  # on NFS this is what sends it


def _beats(folder: Path, number: int) -> str:
    try:
        with open(folder / f"{number:06d}.alive") as file:
            return f"{file.read()} {os.fstat(file.fileno()).st_mtime_ns}"
    except OSError:
        return ""
