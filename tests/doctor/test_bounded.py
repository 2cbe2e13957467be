"""hpcgpt.doctor.bounded: checks run beside each other, and one that hangs is cut off and named."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from hpcgpt.doctor import bounded
from hpcgpt.doctor.bounded import Check
from hpcgpt.doctor.findings import Finding, ok
from hpcgpt.errors import UserError

pytestmark = pytest.mark.processes


def answer(text: str, after_s: float = 0.0) -> Sequence[Finding]:
    time.sleep(after_s)
    return [ok("x", text)]


def read_a_pipe_without_a_writer(pipe: Path, pids: Path) -> Sequence[Finding]:
    child = subprocess.Popen(["cat", str(pipe)])
    pids.write_text(f"{os.getpid()} {child.pid}")
    child.wait()
    return []


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_check_that_hangs_is_cut_off_with_what_it_started_and_the_others_are_not_disturbed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    hanging = partial(read_a_pipe_without_a_writer, tmp_path / "pipe", tmp_path / "pids")
    found = bounded.run([
        Check("first", partial(answer, "a", 0.2), 20, "nothing"),
        Check("mount", hanging, 10, "the file system of /data"),
        Check("last", partial(answer, "b"), 20, "nothing"),
    ])  # fmt: skip
    assert [finding.found for finding in found] == ["a", "no answer within 10 s", "b"]
    assert (found[1].check, found[1].level) == ("mount", "bad")
    assert "the file system of /data may hang" in found[1].advice
    deadline = time.monotonic() + 10
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    while any(map(runs, pids)):
        assert time.monotonic() < deadline, "what the check started still runs"
        time.sleep(0.01)


def test_a_check_that_died_is_not_said_to_have_hung_and_one_that_is_not_needed_is_a_warning() -> None:
    dead, slow = bounded.run([
        Check("death", die, 20, "x"),
        Check("slow", partial(answer, "late", 30), 0.3, "the W&B server", needed=False),
    ])  # fmt: skip
    assert (dead.found, dead.level) == ("the check died", "bad")
    assert (slow.found, slow.level) == ("no answer within 0 s", "warning")


def test_checks_wait_at_the_same_time() -> None:
    """Each waits for the other: one after the other, both would be cut off."""
    reader, writer = os.pipe()
    back, forth = os.pipe()

    def first() -> Sequence[Finding]:
        os.write(writer, b"x")
        os.read(back, 1)
        return answer("first")

    def second() -> Sequence[Finding]:
        os.read(reader, 1)
        os.write(forth, b"x")
        return answer("second")

    found = bounded.run([Check("1", first, 20, ""), Check("2", second, 20, "")])
    assert [finding.found for finding in found] == ["first", "second"]
    for descriptor in (reader, writer, back, forth):
        os.close(descriptor)


def fail(error: Exception) -> Sequence[Finding]:
    raise error


def die() -> Sequence[Finding]:
    os._exit(3)


def test_errors_deaths_and_long_answers() -> None:
    found = bounded.run([
        Check("user", partial(fail, UserError("make it")), 20, "x"),
        Check("bug", partial(fail, KeyError("k")), 20, "x"),
        Check("death", die, 20, "x"),
        Check("long", partial(answer, "y" * 200_000), 20, "x"),
    ])  # fmt: skip
    assert [finding.level for finding in found] == ["bad", "bad", "bad", "ok"]
    assert found[0].found == "make it"
    assert found[1].found == "the check itself failed: KeyError: 'k'"
    assert found[2].found == "the check died"
    assert len(found[3].found) == 200_000
