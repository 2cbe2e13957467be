"""The limits on what a user may keep on a file system, from the command of its kind: lfs, mmlsquota or quota.

A cluster limits users, groups or projects (on Lustre), and the tightest limit ends a run. So all that can be read are
asked for, and the one with the least left counts.

No torch in here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcgpt.checkpoint import listing
from hpcgpt.doctor.disks import RUN_FILES, existing, judge_room, size
from hpcgpt.doctor.findings import Finding, ok

GPFS_COMMANDS = "/usr/lpp/mmfs/bin"  # seldom in PATH: https://www.ibm.com/docs/en/storage-scale


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its type, and its device: a disk, a server's export, a name of GPFS."""

    point: str
    kind: str
    device: str = ""


@dataclass(frozen=True)
class Limit:
    """What is used and may be used; 0 means no limit. Bytes, and files. `of`: whose limit it is, "group 100"."""

    used: int
    most: int
    files: int
    most_files: int
    of: str = ""


def check(what: str, folder: Path, need_bytes: int, need_files: int) -> list[Finding]:
    """Check the limits on the file system of `folder`."""
    name, there = f"{what} quota", existing(folder)
    mount = mount_of(there)
    commands = _commands(mount, there)
    program = commands[0][1][0]
    if shutil.which(program) is None:
        return [ok(name, f"not readable here: no command {Path(program).name} for {mount.point} ({mount.kind})")]
    limits, problem = _ask(commands, mount)
    if not limits:
        return [ok(name, f"not readable here: {problem}" if problem else f"none shown for {mount.point}")]
    return _judge(name, limits, mount, need_bytes, need_files)


def check_of_run(what: str, run: Path, run_bytes: int) -> list[Finding]:
    """Check the limits for a run; `run_bytes` as for `disks.room_of_run`. What is there already is used already."""
    left_bytes = max(0, run_bytes - listing.kept_bytes(run / "checkpoints"))
    return check(what, run, left_bytes, RUN_FILES)


def _ask(commands: Sequence[tuple[str, Sequence[str]]], mount: Mount) -> tuple[list[Limit], str]:
    """Return the limits on a mount, and the first error of a command that showed none."""
    limits: list[Limit] = []
    problem = ""
    for of, command in commands:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              check=False, env=os.environ | {"LC_ALL": "C"})  # fmt: skip
        found = parse(done.stdout, mount, of)
        limits += found
        # quota(1) also ends with a status other than 0 if the user is over the limit.
        if done.returncode and not found:
            problem = problem or f"`{' '.join(command)}`: {(done.stderr.strip() or f'status {done.returncode}')[:200]}"
    return limits, problem


def _judge(name: str, limits: Sequence[Limit], mount: Mount, need_bytes: int, need_files: int) -> list[Finding]:
    blocks = min(limits, key=lambda limit: limit.most - limit.used if limit.most else 1 << 62)
    files = min(limits, key=lambda limit: limit.most_files - limit.files if limit.most_files else 1 << 62)
    rows: tuple[tuple[str, Limit, int, int, int, Callable[[float], str]], ...] = (
        ("", blocks, blocks.used, blocks.most, need_bytes, size),
        (" of files", files, files.files, files.most_files, need_files, lambda number: f"{number:,.0f}"),
    )
    found = []
    for what, limit, used, most, need, show in rows:
        whose = f" by {limit.of}" if limit.of else ""
        text = f"no limit{what} on {mount.point}"
        if most:
            text = f"{show(used)} of {show(most)} used{whose} on {mount.point}"
        advice = f"remove something below {mount.point}, or ask for more"
        found.append(judge_room(name + what, most - used if most else need, need, text, f"{show(need)} free", advice))
    return found


def _commands(mount: Mount, folder: Path) -> list[tuple[str, list[str]]]:
    """Return the commands that show limits on a mount, each with whose limits they are."""
    user = str(os.getuid())
    if mount.kind == "lustre":
        group = str(folder.stat().st_gid)
        found = [("", ["lfs", "quota", "-q", "-u", user, mount.point]),
                 (f"group {group}", ["lfs", "quota", "-q", "-g", group, mount.point])]  # fmt: skip
        if project := _project(folder):
            found.append((f"project {project}", ["lfs", "quota", "-q", "-p", project, mount.point]))
        return found
    if mount.kind in ("gpfs", "mmfs"):
        program = shutil.which("mmlsquota") or shutil.which("mmlsquota", path=GPFS_COMMANDS) or "mmlsquota"
        return [("", [program, "-Y", "-u", user])]
    return [("", ["quota", "-w", "-v", "-u"])]


def _project(folder: Path) -> str:
    """Return the number of a folder's Lustre project, "" without one. lfs-project(1): ``  1000 P /path``."""
    with suppress(OSError):
        done = subprocess.run(["lfs", "project", "-d", str(folder)], stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, errors="replace", check=False)  # fmt: skip
        found = re.match(r"\s*(\d+)\s", done.stdout)
        return found[1] if found and found[1] != "0" else ""
    return ""


def parse(text: str, mount: Mount, of: str = "") -> list[Limit]:
    """Parse the answer of lfs(1), mmlsquota or quota(1) for a mount; [] if it shows no line for it.

    lfs and quota print 1 KiB blocks: used, soft, hard, then a grace period (`-`, or nothing in quota(1) unless the
    used blocks are starred), and the same for files. mmlsquota -Y prints fields between colons, named in a header.
    """
    if mount.kind in ("gpfs", "mmfs"):
        return list(_parse_gpfs(text, mount))
    found = []
    # lfs prints a mount point of more than 15 characters on a line of its own.
    for words in _rows(text):
        # quota(1) names the device, which is the server's export for NFS.
        if len(words) < 7 or words[0] not in (mount.point, mount.device):
            continue
        starred = [word.endswith("*") for word in words]
        # lfs puts numbers into brackets if a server did not answer: then they are the least.
        numbers = [word.rstrip("*").strip("[]") for word in words]
        with suppress(ValueError):
            used, soft, hard = (int(number) for number in numbers[1:4])
            at = 5 if mount.kind == "lustre" or starred[1] else 4
            files, soft_files, hard_files = (int(number) for number in numbers[at : at + 3])
            found.append(Limit(1024 * used, 1024 * (hard or soft), files, hard_files or soft_files, of))
    return found


def _rows(text: str) -> Iterator[Sequence[str]]:
    alone: list[str] = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 1:
            alone = words
            continue
        yield [*alone, *words]
        alone = []


def _parse_gpfs(text: str, mount: Mount) -> Iterator[Limit]:
    names: list[str] = []
    for line in text.splitlines():
        fields = line.split(":")
        if "HEADER" in fields:
            names = fields
        elif names:
            row = dict(zip(names, fields, strict=False))
            with suppress(KeyError, ValueError):
                if row["filesystemName"] in (Path(mount.device).name, *Path(mount.point).parts):
                    yield Limit(1024 * int(row["blockUsage"]), 1024 * int(row["blockLimit"]), int(row["filesUsage"]),
                                int(row["filesLimit"]))  # fmt: skip


def mount_of(folder: Path) -> Mount:
    """Return the mount of a folder's file system, from /proc/self/mounts; the last mount wins.

    Links are followed: on many clusters /scratch is one, into a mount with another name.
    """
    folder = Path(os.path.realpath(folder))
    best = Mount("/", "unknown")
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        device, point, kind = (_unescaped(word) for word in line.split(" ")[:3])
        if folder.is_relative_to(point) and len(point) >= len(best.point):
            best = Mount(point, kind, device)
    return best


def _unescaped(word: str) -> str:
    """Return a word of /proc/self/mounts with its spaces, which are written as ``\\040`` there."""
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), word)
