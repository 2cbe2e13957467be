"""hpcgpt.cli: the exit status of a command whose reader has gone, as with `| head -1` or in a pipe that was closed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcgpt.doctor import __main__ as doctor
from hpcgpt.doctor.findings import bad, ok
from hpcgpt.doctor.nodes import job
from tests.checkpoint.small_checkpoints import flip_byte
from tests.checkpoint.test_layout import run as run  # a fixture
from tests.checkpoint.test_layout import trained as trained  # a fixture of that one
from tests.data.test_shard_format import flip
from tests.programs import ROOT, clean_env


def without_reader(*arguments: str, unbuffered: bool = False, stderr: bool = False) -> int:
    """Run Python with these arguments, with standard output (and error) a pipe without a reader; return its status.

    Unbuffered it fails at the first print, else when it flushes at its end.
    """
    reader, writer = os.pipe()
    os.close(reader)
    env = clean_env() | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, stdout=writer,
                          stderr=writer if stderr else subprocess.PIPE, check=False)  # fmt: skip
    os.close(writer)
    assert not done.stderr, done.stderr.decode()
    return done.returncode


@pytest.mark.processes
@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_status_is_that_of_the_command(status: int) -> None:
    code = f"from hpcgpt import cli; cli.run(lambda argv: print('a line') or {status})"
    assert without_reader("-c", code) == status


@pytest.mark.processes
def test_a_command_that_ends_for_want_of_a_reader_has_no_error() -> None:
    code = "from hpcgpt import cli; cli.run(lambda argv: [print('a line') for _ in range(100)] and 1)"
    assert without_reader("-c", code, unbuffered=True) == 0


@pytest.mark.processes
@pytest.mark.parametrize("unbuffered", [False, True])
def test_damage_is_in_the_status_also_if_nobody_reads_what_it_is(run: Path, unbuffered: bool) -> None:
    verify = ("-m", "hpcgpt.checkpoint", "verify", str(run))
    assert without_reader(*verify, unbuffered=unbuffered) == 0
    flip_byte(run / "checkpoints/step_000000012")
    assert without_reader(*verify, unbuffered=unbuffered) == 1


@pytest.mark.processes
def test_so_is_that_of_shards_which_is_printed_to_standard_error(shards_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards_folder, tmp_path / "copy"))
    assert without_reader("-m", "data_prep.verify", str(copy), stderr=True) == 0
    flip(copy / "train_000000.bin", 2000)
    assert without_reader("-m", "data_prep.verify", str(copy), stderr=True) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_so_is_what_doctor_finds(lose_reader: Callable[[], None], as_json: bool) -> None:
    found = [ok("disk", "fine"), bad("gpu", "gone", "one", "look")]
    report = {"status": 1, "findings": [one.as_dict() for one in found], "rates": {}, "nodes": [], "pairs": [],
              "elapsed_s": 1.0, "exclude": []}  # fmt: skip
    lose_reader()
    assert doctor.show(found, as_json) == 1
    assert job.show(report, as_json) == 1
