"""Checks of a file system: room, files left, and the operations that a run needs of it. User limits: disk_limits.py.

Nothing stays: probes are written into a folder of their own, which is removed.

No torch in here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcgpt.checkpoint import listing
from hpcgpt.doctor.findings import Finding, bad, ok, warning

GIB = 1 << 30
RUN_FILES = 1_000  # checkpoints of 64 ranks, logs and fault reports of some starts
# Training only reads the shards. Room for one more of the default size: 2^30 tokens of 2 bytes, twice while it is made.
DATA_BYTES, DATA_FILES = 4 * GIB, 100
SLOW_FSYNC_S = 1.0
# A save is renamed into place, and status compares times of files with the clock: a second is not noticed, more is.
CLOCK_S, WRONG_CLOCK_S = 1.0, 5.0


def existing(folder: Path) -> Path:
    """Return the nearest folder above that exists: the run folder itself may not be there yet."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def room_of_run(what: str, run: Path, run_bytes: int) -> list[Finding]:
    """Check the room in a run folder; `run_bytes`: of all its checkpoints at one time, also of those that are there.

    Raises:
        OSError: the folder of its checkpoints cannot be read.
    """
    there_bytes = listing.kept_bytes(run / "checkpoints")
    return room(what, run, max(0, run_bytes - there_bytes), RUN_FILES, there_bytes)


def room(what: str, folder: Path, need_bytes: int, need_files: int, there_bytes: int = 0) -> list[Finding]:
    """Check free bytes and free inodes of the file system of `folder`; half of what is needed is bad.

    `there_bytes`: what is there already of the same; it is only named.
    """
    found = os.statvfs(existing(folder))
    if found.f_flag & os.ST_RDONLY:
        return [ok(f"{what} room", f"the file system of {folder} can only be read here")]
    free, files = found.f_bavail * found.f_frsize, found.f_favail
    total = found.f_blocks * found.f_frsize
    where = f"on the file system of {folder}"
    besides = f", besides {size(there_bytes)} there already" if there_bytes else ""
    advice = f"remove something there, or choose another folder than {folder}"
    results = [judge_room(f"{what} room", free, need_bytes, f"{size(free)} of {size(total)} free {where}",
                     f"at least {size(need_bytes)}{besides}", advice)]  # fmt: skip
    # btrfs, and some parallel file systems, make inodes as they are needed and show none.
    if found.f_files:
        results.append(judge_room(f"{what} inodes", files, need_files, f"{files:,} more files {where}",
                             f"at least {need_files:,}", advice))  # fmt: skip
    return results


def judge_room(check: str, free: int, need: int, found: str, expected: str, advice: str) -> Finding:
    """Return the finding for what is `free` of what is needed: less is a warning, less than half is bad."""
    if free >= need:
        return ok(check, found, expected)
    return (bad if free < need // 2 else warning)(check, found, expected, advice)


def size(number: float) -> str:
    for unit, name in ((1 << 40, "TiB"), (GIB, "GiB"), (1 << 20, "MiB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number / 1024:,.0f} KiB"


# --- operations ------------------------------------------------------------------------------------


def operations(what: str, folder: Path) -> list[Finding]:
    """Check what a run does there: write and flush, rename over a file, hard link, lock; and the server's clock."""
    try:
        with _probe_folder(folder) as probe:
            return [_write(what, probe), *_links(what, probe), _lock(what, probe), clock(what, probe)]
    except OSError as error:
        full = {errno.ENOSPC: "it is full", errno.EDQUOT: "your limit is reached"}.get(error.errno or 0)
        check = f"{what} room" if full else f"{what} write"
        found = f"cannot write to {folder}: {full or error.strerror}"
        advice = "make room there, or choose another folder with --run.dir"
        return [bad(check, found, "a folder that you may write to", advice)]


@contextmanager
def _probe_folder(folder: Path) -> Iterator[Path]:
    name = tempfile.mkdtemp(prefix=f".hpcgpt-doctor-{socket.gethostname()}-", dir=existing(folder))
    try:
        yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


def _write(what: str, probe: Path) -> Finding:
    began_at = time.monotonic()
    with open(probe / "a", "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    elapsed_s = time.monotonic() - began_at
    found, expected = f"1 MiB written and flushed in {1000 * elapsed_s:.0f} ms", f"under {SLOW_FSYNC_S:.0f} s"
    if elapsed_s < SLOW_FSYNC_S:
        return ok(f"{what} write", found, expected)
    return warning(
        f"{what} write", found, expected, "the file system is busy: saves will take long; see checkpoint.every"
    )


def _links(what: str, probe: Path) -> list[Finding]:
    """Check the two operations that make a checkpoint and a lease appear as a whole."""
    (probe / "b").write_bytes(b"new")
    (probe / "b").rename(probe / "a")
    if (probe / "a").read_bytes() != b"new":
        return [bad(f"{what} rename", "a renamed file has the old content", "the new content", "use another folder")]
    found = [ok(f"{what} rename", "a file replaces another as a whole")]
    try:
        os.link(probe / "a", probe / "c")
    except OSError as error:
        return [*found, warning(f"{what} link", f"no hard links: {error.strerror}", "hard links",
                                "leases are created in place instead, which works")]  # fmt: skip
    with suppress(FileExistsError):
        os.link(probe / "a", probe / "c")
        return [*found, bad(f"{what} link", "a second link with the same name was made", "an error",
                            "two attempts could hold one run folder: use another one")]  # fmt: skip
    return [*found, ok(f"{what} link", "a name can be taken only once")]


def _lock(what: str, probe: Path) -> Finding:
    try:
        with open(probe / "lock", "wb") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return warning(f"{what} lock", f"no locks: {error.strerror}", "POSIX locks",
                       "hpcgpt needs none; other libraries may: keep their caches (HF_HOME) elsewhere")  # fmt: skip
    return ok(f"{what} lock", "a file can be locked")


def clock(what: str, probe: Path) -> Finding:
    """Compare the clock of the file system, from the time of a new file, with this machine's."""
    path = probe / "clock"
    before = time.time()
    path.write_bytes(b"x")
    offset_s = path.stat().st_mtime - (before + time.time()) / 2
    return judge_clock(f"{what} clock", offset_s, "the file system's clock", CLOCK_S + time.time() - before)


def judge_clock(check: str, offset_s: float, whose: str, tolerance_s: float = CLOCK_S) -> Finding:
    """Return the finding for another clock that is `offset_s` ahead of this one."""
    found = f"{whose} differs by {offset_s:+.3f} s"
    if abs(offset_s) <= tolerance_s:
        return ok(check, found, f"at most {CLOCK_S:.0f} s")
    level = warning if abs(offset_s) < WRONG_CLOCK_S else bad
    return level(check, found, f"at most {CLOCK_S:.0f} s", "ask the site to set this machine's clock (chrony, NTP)")


# --- reading ---------------------------------------------------------------------------------------


def read_rate(path: Path, most_bytes: int, limit_s: float) -> tuple[int, float]:
    """Read the beginning of a file, past this machine's cache where the kernel allows it; return bytes and seconds."""
    with open(path, "rb", buffering=0) as file:
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, most_bytes, os.POSIX_FADV_DONTNEED)
        buffer, done, began_at = bytearray(8 << 20), 0, time.monotonic()
        while done < most_bytes and time.monotonic() - began_at < limit_s:
            count = file.readinto(buffer)
            if not count:
                break
            done += count
    return done, max(time.monotonic() - began_at, 1e-6)
