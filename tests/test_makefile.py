"""Makefile: the user's environment has no effect on what is installed and for what a bundle is made."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.processes

RECORD = """#!/bin/sh
echo "$(basename "$0") PYTHONPATH=$PYTHONPATH PYTHONHOME=$PYTHONHOME $*" >> calls
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile, and a pip and a python that record their calls and do nothing."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pip", "python"):
        program = tmp_path / ".venv" / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(RECORD)
        program.chmod(0o755)
    return tmp_path


def make(checkout: Path, *arguments: str, **env: str) -> list[str]:
    """Run make; return the calls of pip and python."""
    own = {name: value for name, value in clean_env().items() if name not in ("PYTHONPATH", "PYTHONHOME", "MAKEFLAGS")}
    subprocess.run(["make", *arguments], cwd=checkout, env=own | env, capture_output=True, check=True)
    return (checkout / "calls").read_text().splitlines()


@pytest.mark.parametrize("target", ["install", ".venv/.installed-test"])
def test_what_a_loaded_module_has_is_installed_nevertheless(checkout: Path, target: str) -> None:
    """pip takes what it finds in PYTHONPATH for installed, and skips it."""
    calls = make(checkout, target, PYTHONPATH="/opt/module/site-packages", PYTHONHOME="/opt/module")
    assert [call for call in calls if call.startswith("pip") and "--editable" in call]
    assert len(calls) >= 3  # the others compile bytecode
    assert [call for call in calls if not call.split(" ", 1)[1].startswith("PYTHONPATH= PYTHONHOME= ")] == []


def test_a_new_environment_is_made_without_what_a_loaded_module_has(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    python = checkout / "python"
    python.write_text(
        RECORD
        + 'case $2 in venv) mkdir -p .venv/bin; for name in pip python; do cp "$0" .venv/bin/$name; done ;; esac\n'
    )
    python.chmod(0o755)
    calls = make(checkout, "install", f"PYTHON={python}", PYTHONPATH="/opt/module/site-packages")
    assert [call for call in calls if "-m venv .venv" in call]
    assert [call for call in calls if "--upgrade pip" in call]
    assert [call for call in calls if "PYTHONPATH= " not in call] == []


def test_a_bundle_is_for_what_the_command_line_says_and_not_the_environment(checkout: Path) -> None:
    """Docker's images of Python export PYTHON_VERSION=3.11.9."""
    (checkout / ".venv" / ".installed").touch()
    image = {"PYTHON_VERSION": "3.11.9", "ARCH": "arm64"}
    (call,) = make(checkout, "bundle", **image)
    assert call.endswith(" bundle/make_bundle.py")
    *_, call = make(checkout, "bundle", "ARCH=aarch64", "PYTHON_VERSION=3.12", **image)
    assert call.endswith(" bundle/make_bundle.py --arch aarch64 --python-version 3.12")
