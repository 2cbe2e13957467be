"""The lease on a run folder: of all attempts at a run, only the newest may write.

After a node failure the old ranks can still be alive and writing while the requeued job runs on other nodes. Locks do
not help: many network file systems do not keep them. So each attempt acquires a lease, a number one higher than the
last, before it does anything else::

    generations/000003.json    the holder: host, process, job, time; created by a hard link, so exactly once
    generations/000003.alive   the heartbeat: a counter that the holder rewrites every HEARTBEAT_S seconds
    generations/000003.done    the holder has released the lease

A holder that finds a higher number exits at once. It looks with every heartbeat, and ``Lease.check`` looks before
each commit. An attempt that finds an unreleased lease watches its heartbeat: if the counter moves the holder is alive,
and the attempt is refused. Only counters are compared, never clocks of different hosts. Two cases need no watching:

- the same Slurm job with a higher restart count: Slurm has ended, or given up on, the start before;
- a holder whose process is gone. That can be seen only within the same kernel and pid namespace; in another container
  its pid means nothing.

This relies on one property of the file system: opening a folder or a file asks the server for its current state. NFS
clients do that (close-to-open consistency, unless mounted with `nocto`), also for folders, where other calls may be
answered from a cache for a minute. So `_newest` opens the folder each time, and heartbeat files are opened to be read.

A full disk must not prevent a start: only the name of a lease's file matters, it may be empty; and where the counter
cannot be written, the modification time of its file still changes.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
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
_LEASE_FILE = re.compile(r"\d+\.json")
_REMEDY = "end it first, or give this run another --run.name"


class HeldError(UserError):
    """Another attempt holds the lease and is alive, or acquired it at the same moment."""


@dataclass
class Lease:
    """The lease that this process holds. Of a job's ranks only rank 0 has one."""

    folder: Path
    number: int
    _stop: threading.Event

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Release the lease. After an error, exit the process if a newer attempt has acquired it.

        That is the reason then: a newer attempt removes what an older one, which was stopped for a while, is writing.
        """
        if kind is not None:
            with suppress(OSError):
                self.check()
        self.release()

    def superseded_by(self) -> int | None:
        """Return the newest lease's number if it is higher than this one's, else None."""
        newest = _newest(self.folder)
        return newest if newest > self.number else None

    def check(self) -> None:
        """Exit the process, now, if a newer attempt has acquired the lease."""
        newer = self.superseded_by()
        if newer is not None:
            print(
                f"error: attempt {newer} has taken over {self.folder.parent}: this attempt ({self.number}, host "
                f"{socket.gethostname()}, pid {os.getpid()}) exits without writing anything more",
                file=sys.stderr,
                flush=True,
            )
            streams.drain()
            # Not sys.exit: the main thread may hang in a collective with ranks that are gone.
            os._exit(SUPERSEDED)

    def release(self) -> None:
        """Record that this attempt has ended, so that the next one need not watch its heartbeat."""
        self._stop.set()
        try:
            atomic.write(self.folder / f"{self.number:06d}.done", b"")
        except OSError as error:
            # The next attempt then watches for a few seconds, or sees that this process is gone.
            streams.warn(error)

    def _check_forever(self, instead: Callable[[], None]) -> None:
        instead()
        while True:
            with suppress(OSError):
                self.check()
            self._stop.wait(5 * HEARTBEAT_S)

    def _beat_forever(self) -> None:
        path = self.folder / f"{self.number:06d}.alive"
        beats = 0
        while not self._stop.wait(HEARTBEAT_S):
            beats += 1
            try:
                self.check()
                _write_beat(path, beats)
            except OSError as error:
                # A full or hanging disk must not end the run; at worst another attempt takes over.
                streams.warn(f"no heartbeat: {error}")


def exit_when_superseded(run_folder: Path, number: int, instead: Callable[[], None] = lambda: None) -> None:
    """Exit this process as soon as an attempt newer than `number` holds the lease.

    For the ranks without a lease: if rank 0's node has failed, nothing else ends them. `instead` is called first, in a
    thread, and returns when the process that checks instead of this one has ended, if there is one.
    """
    mine = Lease(run_folder / "generations", number, threading.Event())
    threading.Thread(target=mine._check_forever, args=(instead,), name="lease", daemon=True).start()


def acquire(run_folder: Path, job_start: str, remedy: str = _REMEDY) -> Lease:
    """Acquire the next lease on a run folder. `job_start` is world.job_start: '<job>_<restart>' or ''.

    Raises:
        HeldError: another attempt holds the lease and is alive, or acquired it at the same moment.
    """
    folder = run_folder / "generations"
    folder.mkdir(parents=True, exist_ok=True)
    newest = wait_until_gone(run_folder, job_start, remedy)
    number = newest + 1
    holder = {"host": socket.gethostname(), "attempt": job_start, "time": time.time(), **_process(os.getpid())}
    if not atomic.claim(folder / f"{number:06d}.json", json.dumps(holder).encode()):
        raise HeldError(f"{run_folder} has just been taken by another job: {_describe(folder, number)}")
    lease = Lease(folder, number, threading.Event())
    threading.Thread(target=lease._beat_forever, name="heartbeat", daemon=True).start()
    return lease


def is_held(run_folder: Path) -> bool:
    """Has the newest lease on this run folder not been released?"""
    folder = run_folder / "generations"
    newest = _newest(folder)
    return newest > 0 and not (folder / f"{newest:06d}.done").exists()


def newest_number(run_folder: Path) -> int:
    """Return the number of the newest lease on this run folder; 0 if there is none."""
    return _newest(run_folder / "generations")


def holder_is_gone(run_folder: Path) -> bool:
    """Is the process with the newest lease known to have ended? On another host or in another container it is not."""
    folder = run_folder / "generations"
    try:
        return _is_known_to_be_gone(_holder(folder, _newest(folder)))
    except (OSError, KeyError, TypeError, OverflowError, RecursionError):  # its file is unreadable, or damaged
        return False


def holder(run_folder: Path) -> str:
    """Describe the attempt with the newest lease; '' if it has released it, or is known to have ended."""
    if not is_held(run_folder) or holder_is_gone(run_folder):
        return ""
    folder = run_folder / "generations"
    number = _newest(folder)
    try:
        return _describe(folder, number)
    except (OSError, KeyError, TypeError, AttributeError, RecursionError):  # its file is unreadable, or damaged
        return f"attempt {number}"


def wait_until_gone(run_folder: Path, job_start: str, remedy: str = _REMEDY) -> int:
    """Return the number of the newest lease once its holder is gone; 0 if there was none yet.

    Raises:
        HeldError: its holder is alive; the message ends with `remedy`.
    """
    return wait_until_all_gone([run_folder], job_start, remedy)[0]


def wait_until_all_gone(run_folders: Sequence[Path], job_start: str, remedy: str = _REMEDY) -> list[int]:
    """Do so for several folders, whose leases are watched at the same time.

    Raises:
        HeldError: one of the holders is alive.
    """
    folders = [run_folder / "generations" for run_folder in run_folders]
    newest = [(folder, _newest(folder)) for folder in folders]
    watched = {lease: _beats(*lease) for lease in newest if _is_to_be_watched(*lease, job_start)}
    if watched:
        first, more = _describe(*next(iter(watched))), len(watched) - 1
        others = f", like {more:,} others" if more else ""
        print(f"{first} has not released its lease{others}: watching it for {WATCH_S:.0f} s", flush=True)
    deadline = time.monotonic() + WATCH_S
    while watched and time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 4)
        for (folder, number), before in list(watched.items()):
            if _beats(folder, number) != before:
                raise HeldError(f"{folder.parent} is in use by {_describe(folder, number)}, which is alive: {remedy}")
            if (folder / f"{number:06d}.done").exists():
                del watched[folder, number]
    return [number for _, number in newest]


def _is_to_be_watched(folder: Path, number: int, job_start: str) -> bool:
    """Is there a lease that was not released, and may its holder be alive?"""
    if not number:
        return False
    holder = _holder(folder, number)
    if (folder / f"{number:06d}.done").exists() or _is_next_start(holder.get("attempt", ""), job_start):
        return False
    return not _is_known_to_be_gone(holder)


def _is_next_start(before: str, now: str) -> bool:
    """Is `now` a later start of the same Slurm job as `before`?"""
    job, _, restart = before.rpartition("_")
    new_job, _, new_restart = now.rpartition("_")
    return bool(job) and job == new_job and int(new_restart) > int(restart)


def _process(pid: int) -> dict[str, Any]:
    """Identify a process of this host: its pid, kernel, pid namespace and start time.

    Without /proc there is only the pid. Some containers hide the kernel's id: `boot` is None then, and never equal to
    another. Raises OSError if there is no such process.
    """
    if not Path("/proc/self/stat").exists():
        return {"pid": pid, "boot": "", "pid_namespace": 0, "began": 0}
    boot: str | None = None
    with suppress(OSError):
        boot = BOOT_ID.read_text().strip()
    # The name before the last bracket may contain spaces, brackets and bytes that are not UTF-8. The 22nd field is the
    # start time.
    began = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return {"pid": pid, "boot": boot, "pid_namespace": os.stat("/proc/self/ns/pid").st_ino, "began": began}


def _is_known_to_be_gone(holder: dict[str, Any]) -> bool:
    """Is the holder known to have ended? Only processes of this kernel and pid namespace can be seen."""
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
    # Not by glob, which treats an unreadable folder as an empty one.
    try:
        return max((int(name[:-5]) for name in os.listdir(folder) if _LEASE_FILE.fullmatch(name)), default=0)
    except FileNotFoundError:
        return 0


def _holder(folder: Path, number: int) -> dict[str, Any]:
    """Return the holder of a lease; {} if its file is empty: the disk was full, or it is being written."""
    try:
        found = json.loads((folder / f"{number:06d}.json").read_bytes())
    except ValueError:
        return {}
    return dict(found) if isinstance(found, dict) else {}


def _describe(folder: Path, number: int) -> str:
    holder = _holder(folder, number)
    if not {"host", "pid"} <= holder.keys():
        return f"attempt {number}"
    job = f"Slurm job {str(holder['attempt']).rpartition('_')[0]}, " if holder.get("attempt") else ""
    return f"attempt {number} ({job}host {holder['host']}, pid {holder['pid']})"


def _write_beat(path: Path, beats: int) -> None:
    """Overwrite in place: a truncated file could not be refilled on a full disk, and its holder would look dead."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.utime(descriptor)  # needs no room
        os.pwrite(descriptor, b"%012d\n" % beats, 0)
    finally:
        os.close(descriptor)  # on NFS, closing sends it to the server


def _beats(folder: Path, number: int) -> str:
    try:
        with open(folder / f"{number:06d}.alive") as file:
            return f"{file.read()} {os.fstat(file.fileno()).st_mtime_ns}"
    except OSError:
        return ""
