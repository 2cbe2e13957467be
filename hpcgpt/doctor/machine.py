"""Checks of this machine: the limits of its processes, shared memory, and what Python runs.

No torch in here.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import replace
from pathlib import Path

from hpcgpt.doctor import disks
from hpcgpt.doctor.findings import Finding, bad, ok, warning
from hpcgpt.output.counted import counted

LEAST_PYTHON = (3, 11)
# A rank keeps up to 512 shards open (hpcgpt/data/shard_reader.py), beside sockets to the other ranks.
LEAST_FILES = 1024
# NCCL keeps its buffers between the GPUs of a node there; containers get 64 MiB unless asked for more:
# https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html ("Shared memory")
SHARED_BYTES, LEAST_SHARED_BYTES = 1 << 30, 65 << 20
INFINIBAND = Path("/sys/class/infiniband")


def python() -> list[Finding]:
    cores = counted(os.cpu_count() or 1, "core")
    found = f"{platform.python_version()}, {sys.executable}, on {platform.machine()} with {cores}"
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return [bad("python", found, f"{least} or newer", "load a newer Python, and make the environment again")]
    return [ok("python", found)]


def limits() -> list[Finding]:
    """Check the locked memory, open files and shared memory that a process may have here."""
    return [_locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], INFINIBAND.is_dir()),
            _open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)), *shared_memory(Path("/dev/shm"))]  # fmt: skip


def limits_of_login() -> list[Finding]:
    """Check the same on a login node, where nothing is bad: most sites give jobs limits of their own."""
    return [replace(finding, level="warning", advice=f"{finding.advice}. Jobs may have other limits: see --nodes")
            if finding.level == "bad" else finding for finding in limits()]  # fmt: skip


def _locked_memory(limit: int, has_infiniband: bool) -> Finding:
    if limit in (resource.RLIM_INFINITY, -1):
        return ok("memlock", "unlimited")
    found = disks.size(limit)
    if not has_infiniband:
        return ok("memlock", f"{found}; there is no InfiniBand here, which would need more")
    return bad("memlock", found, "unlimited: InfiniBand locks the memory that it sends from",
               "put `ulimit -l unlimited` into the job, or ask the site: PropagateResourceLimitsExcept")  # fmt: skip


def _open_files(soft: int, hard: int) -> Finding:
    found = f"{soft:,} (at most {hard:,})"
    if soft >= LEAST_FILES or soft == resource.RLIM_INFINITY:
        return ok("open files", found)
    return warning("open files", found, f"at least {LEAST_FILES:,}", f"put `ulimit -n {LEAST_FILES}` into your profile")


def shared_memory(folder: Path) -> list[Finding]:
    try:
        found = os.statvfs(folder)
    except OSError as error:
        return [bad("/dev/shm", error.strerror or "missing", "shared memory", "mount it; containers: --shm-size=8g")]
    free = found.f_bavail * found.f_frsize
    text = f"{disks.size(free)} of {disks.size(found.f_blocks * found.f_frsize)} free"
    expected = f"at least {disks.size(SHARED_BYTES)}"
    if free >= SHARED_BYTES:
        return [ok("/dev/shm", text, expected)]
    level = bad if free < LEAST_SHARED_BYTES else warning
    return [level("/dev/shm", text, expected, "remove what earlier jobs left there; in a container: --shm-size=8g")]


def scratch(need_bytes: int = disks.GIB) -> list[Finding]:
    """Check the room of the folder for temporary files, which compilers and libraries use."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    if not folder.is_dir():
        return [
            bad("TMPDIR", f"there is no folder {folder}", "a folder for temporary files", "unset TMPDIR, or make it")
        ]
    return disks.room("TMPDIR", folder, need_bytes, 1_000)
