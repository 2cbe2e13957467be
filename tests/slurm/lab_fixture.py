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


def bring_up(lab: Lab) -> bool:
    """Bring the lab up for this process; return whether it was not up before.

    One that belongs to a test run that was killed has its jobs and faults: it is taken down first.
    """
    owner = lab.state / "tests.pid"
    with suppress(FileNotFoundError, NotADirectoryError):
        pid_and_start = owner.read_text()
        if pid_and_start != _identity(int(pid_and_start.split()[0])):
            commands.down(lab.name)
    was_up = commands.status(lab.name).up
    commands.up(lab)
    if not was_up:
        new = owner.with_suffix(".new")
        new.write_text(_identity(os.getpid()))
        new.replace(owner)
    return not was_up


def _identity(pid: int) -> str:
    """Return the process's pid and its start, in ticks since boot; '' if there is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return f"{pid} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    return ""


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if os.environ.get("LAB") == "0":
        pytest.skip("LAB=0")
    if reason := lab_needs.why_not():
        pytest.skip(reason)
    is_ours = bring_up(SESSION_LAB)
    yield SESSION_LAB
    if is_ours:
        commands.down(SESSION_LAB.name)
