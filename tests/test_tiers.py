"""tests.tiers: a test that starts a process says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env
from tests.tiers import LAB_GROUPS, LONGEST

HOOKS = "from tests.tiers import pytest_configure, pytest_fixture_setup, pytest_runtest_call\n"
TESTS = """
import subprocess, sys
import pytest

@pytest.fixture(scope="module")
def started():
    subprocess.run([sys.executable, "-c", ""])

def test_start():
    subprocess.run([sys.executable, "-c", ""])

def test_fixture(started):
    pass

def test_second_user_of_the_fixture(started):
    pass

@pytest.mark.processes
def test_marked(started):
    subprocess.run([sys.executable, "-c", ""])

def test_tool():
    subprocess.run(["git", "--version"])
"""


@pytest.mark.processes
def test_a_test_that_starts_a_process_without_the_mark_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    processes\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"], cwd=tmp_path, text=True,
        env=clean_env() | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    failed = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert sorted(failed) == ["test_fixture", "test_second_user_of_the_fixture", "test_start"], (
        done.stdout + done.stderr
    )
    assert "mark it with `processes`" in done.stdout


def test_the_files_that_are_grouped_exist() -> None:
    files = {path.name for path in ROOT.glob("tests/**/test_*.py")}
    assert {*LONGEST, *LAB_GROUPS[0], *LAB_GROUPS[1]} <= files
