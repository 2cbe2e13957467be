"""The tests' Slurm: one lab for the session, brought up by the first test that asks for it.

A lab that was up before the session is used as it is, and stays up. Where none can be started, each test that needs
one is skipped, with a message that says what is missing. HPCGPT_LAB="hpcgpt-lab2 10.78.0" uses another one: two test
runs on one machine must not cut each other's network cables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.programs import ROOT

sys.path.insert(0, str(ROOT / "slurm/lab"))

import lab as commands
import lab_needs
from lab_conf import Lab

NAME, _, SUBNET = os.environ.get("HPCGPT_LAB", "").partition(" ")
SESSION_LAB = Lab(NAME or Lab.name, SUBNET or Lab.subnet)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    if os.environ.get("LAB") == "0":
        pytest.skip("LAB=0")
    if reason := lab_needs.why_not():
        pytest.skip(reason)
    was_up = commands.status(SESSION_LAB.name).up
    commands.up(SESSION_LAB)
    yield SESSION_LAB
    if not was_up:
        commands.down(SESSION_LAB.name)
