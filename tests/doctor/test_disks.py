"""hpcgpt.doctor.disks: room, inodes, and the operations that a run needs of a file system."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from hpcgpt.doctor import disks
from hpcgpt.doctor.findings import Finding
from tests.disks import another_user, fill, small_disk
from tests.disks import shared as shared


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in found}


def test_a_small_and_a_full_file_system_are_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "3m") as disk:
        few = disks.room("run folder", disk / "not" / "there", 4 << 20, 10)
        assert levels(few) == {"run folder room": "warning", "run folder inodes": "ok"}
        assert few[0].found == f"3.0 MiB of 3.0 MiB free on the file system of {disk}/not/there"
        assert levels(disks.operations("run folder", disk)) == {
            f"run folder {what}": "ok" for what in ("write", "rename", "link", "lock", "clock")
        }
        fill(disk)
        full = disks.room("run folder", disk, 4 << 20, 10**9)
        assert levels(full) == {"run folder room": "bad", "run folder inodes": "bad"}
        (written,) = disks.operations("run folder", disk)
        assert (written.level, "cannot write" in written.found, "it is full" in written.found) == ("bad", True, True)
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.processes
def test_a_disk_that_can_only_be_read_needs_no_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-n", "-o", "remount,ro", str(disk)], check=True)
        (found,) = disks.room("data", disk, 1 << 40, 10)
        assert (found.level, found.found) == ("ok", f"the file system of {disk} can only be read here")


def test_a_folder_that_this_user_may_not_write_to_is_bad(shared: Path) -> None:
    shared.chmod(0o755)
    with another_user():
        (found,) = disks.operations("run folder", shared)
    assert found.level == "bad"
    assert "Permission denied" in found.found


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    disks.operations("x", tmp_path / "runs" / "mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("offset_s", "level"),
    [(0.0, "ok"), (-0.9, "ok"), (1.2, "warning"), (-4.0, "warning"), (5.1, "bad"), (-3600, "bad")],
)
def test_clocks_may_differ_by_a_second(offset_s: float, level: str) -> None:
    assert disks.judge_clock("clock", offset_s, "the server's clock").level == level


def test_the_clock_of_the_file_system_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + 100)
    found = disks.clock("run folder", tmp_path)
    assert found.level == "bad"
    offset_s = float(found.found.removeprefix("the file system's clock differs by ").removesuffix(" s"))
    assert offset_s == pytest.approx(-100, abs=20), "the file may be written some time after the clock was read"


def test_a_file_is_read_up_to_a_number_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(bytes(20 << 20))
    assert disks.read_rate(tmp_path / "shard", 1 << 30, 60)[0] == 20 << 20
    assert 8 << 20 <= disks.read_rate(tmp_path / "shard", 1 << 20, 60)[0] < 20 << 20
