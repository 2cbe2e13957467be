"""hpcgpt.doctor.disk_limits: limits of users, groups and projects, from the command of each file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcgpt.doctor import disk_limits
from hpcgpt.doctor.disk_limits import Limit, Mount
from tests.disks import small_disk

GIB = 1 << 30

# As the manual pages of quota(1), lfs-quota(1) and mmlsquota show it.
QUOTA = """\
Disk quotas for user me (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
other:/scratch        7        8       9               1       2       3
server:/home  2097152  4194304 5242880          1200    9000   10000
"""
OVER = QUOTA.replace("2097152 ", "4194999*").replace("5242880          ", "5242880  6days   ")
LFS = """\
     /scratch 1048576       0 2097152       -  500       0    1000       -
"""
# A long mount point, more files than the limit, and a server that did not answer.
LONG = """\
/lustre/orion/scratch
                [1048576]      0 2097152       -  1001*      0    1000       6d23h
"""
GPFS = """\
mmlsquota::HEADER:version:reserved:reserved:filesystemName:quotaType:id:name:blockUsage:blockQuota:blockLimit:blockInDoubt:\
blockGrace:filesUsage:filesQuota:filesLimit:filesInDoubt:
mmlsquota::0:1:::work:USR:1000:me:1024:2048:4096:0:none:7:0:0:0:
"""
HOME = Mount("/home", "nfs4", "server:/home")


@pytest.mark.parametrize(
    ("text", "mount", "limit"),
    [
        (QUOTA, HOME, Limit(2 * GIB, 5 * GIB, 1200, 10_000)),
        (OVER, HOME, Limit(4194999 * 1024, 5 * GIB, 1200, 10_000)),
        (QUOTA.replace("5242880", "0      "), HOME, Limit(2 * GIB, 4 * GIB, 1200, 10_000)),
        (QUOTA, Mount("/work", "nfs4", "server:/work"), None),
        (LFS, Mount("/scratch", "lustre"), Limit(GIB, 2 * GIB, 500, 1000)),
        (LONG, Mount("/lustre/orion/scratch", "lustre"), Limit(GIB, 2 * GIB, 1001, 1000)),
        (LFS, Mount("/other", "lustre"), None),
        (GPFS, Mount("/p/project", "gpfs", "work"), Limit(1 << 20, 4 << 20, 7, 0)),
        (GPFS, Mount("/gpfs/work", "gpfs", "/dev/fs1"), Limit(1 << 20, 4 << 20, 7, 0)),
        (GPFS, Mount("/gpfs/other", "gpfs", "other"), None),
        ("Disk quotas for user me (uid 1000): none\n", Mount("/", "ext4", "/dev/sda1"), None),
        ("", Mount("/", "ext4", "/dev/sda1"), None),
    ],
)
def test_the_limits_are_read_from_the_command_of_each_file_system(text: str, mount: Mount, limit: Limit | None) -> None:
    assert disk_limits.parse(text, mount) == ([limit] if limit else [])


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.processes
@pytest.mark.parametrize(("used", "status", "level"), [(1, 0, "ok"), (4_500_000, 0, "bad"), (9_000_000, 1, "bad")])
def test_a_user_near_the_limit_is_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int, status: int, level: str
) -> None:
    """quota(1) ends with status 1 if the user is over a limit."""
    device = disk_limits.mount_of(tmp_path).device
    program(tmp_path, "quota", f"echo '{device} {used} 0 5242880 3 0 0'; exit {status}")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    blocks, files = disk_limits.check("run folder", tmp_path, 3 * GIB, 10)
    assert (blocks.level, files.level) == (level, "ok")
    assert "of 5.0 GiB used" in blocks.found


@pytest.mark.processes
def test_the_tightest_of_the_users_the_groups_and_the_projects_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Mount("/scratch", "lustre")
    monkeypatch.setattr(disk_limits, "mount_of", lambda _: mount)
    program(tmp_path, "lfs", """case "$*" in
    "project -d "*) echo "  4711 P /scratch/p";;
    *" -u "*) echo "/scratch 1 0 0 - 5 0 0 -";;
    *" -g "*) echo "/scratch 2 0 0 - 5 0 1000000 -";;
    *" -p 4711 "*) echo "/scratch 1000 0 2000 - 7 0 0 -";;
    esac""")  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    blocks, files = disk_limits.check("data", tmp_path, GIB, 10)
    assert (blocks.level, blocks.found) == ("bad", "1,000 KiB of 2.0 MiB used by project 4711 on /scratch")
    group = tmp_path.stat().st_gid
    assert (files.level, files.found) == ("ok", f"5 of 1,000,000 used by group {group} on /scratch")


@pytest.mark.processes
def test_limits_that_cannot_be_read_are_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (found,) = disk_limits.check("data", tmp_path, GIB, 10)
    assert (found.level, found.found.startswith("not readable here: no command quota")) == ("ok", True)
    program(tmp_path, "quota", "echo 'quota: cannot reach the server' >&2; exit 1")
    (found,) = disk_limits.check("data", tmp_path, GIB, 10)
    assert "cannot reach the server" in found.found
    program(tmp_path, "quota", "exit 0")
    (found,) = disk_limits.check("data", tmp_path, GIB, 10)
    assert found.found.startswith("none shown for ")


def test_the_mount_is_the_innermost_one_and_links_are_followed(tmp_path: Path) -> None:
    with small_disk(tmp_path / "a disk", "1m") as disk:
        assert (disk_limits.mount_of(disk).point, disk_limits.mount_of(disk).kind) == (str(disk), "tmpfs")
        assert disk_limits.mount_of(tmp_path).point != str(disk)
        (tmp_path / "scratch").symlink_to(disk)
        assert disk_limits.mount_of(tmp_path / "scratch" / "mine").point == str(disk)
