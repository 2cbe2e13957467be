"""The tests' Slurm: one lab for the session, brought up by the first test that asks for it.

A lab that was up before the session is used as it is, and stays up; but one of a test run that was killed is taken down
first. Where none can be started, each test that needs one is skipped, with a message that says what is missing.
HPCGPT_LAB="hpcgpt-lab2 10.78.0" uses another one: two test runs on one machine must not cut each other's network
cables. For the same reason each process of pytest-xdist has a lab of its own: hpcgpt-lab0 at 10.77.0, hpcgpt-lab1 at
10.77.1, and so on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.programs import ROOT

sys.path.insert(0, str(ROOT / "slurm/lab"))

import lab as commands
import lab_needs
from lab_conf import Lab


def _session_lab() -> Lab:
    name, _, subnet = os.environ.get("HPCGPT_LAB", f"{Lab.name} {Lab.subnet}").partition(" ")
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if not worker:
        return Lab(name, subnet)
    net, _, last = subnet.rpartition(".")
    return Lab(f"{name}{worker}", f"{net}.{int(last) + int(worker)}")


SESSION_LAB = _session_lab()


def _runs(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if os.environ.get("LAB") == "0":
        pytest.skip("LAB=0")
    if reason := lab_needs.why_not():
        pytest.skip(reason)
    owner = SESSION_LAB.state / "tests.pid"
    if owner.exists() and not _runs(int(owner.read_text())):
        commands.down(SESSION_LAB.name)
    was_up = commands.status(SESSION_LAB.name).up
    commands.up(SESSION_LAB)
    if not was_up:
        owner.write_text(str(os.getpid()))
    yield SESSION_LAB
    if not was_up:
        commands.down(SESSION_LAB.name)
