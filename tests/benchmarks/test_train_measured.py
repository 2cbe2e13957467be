"""benchmarks/gpu/train_measured.py, and with it that a program may call `hpcgpt.train.main` and continue after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.exit_codes import FINISHED
from tests.programs import ROOT, clean_env


@pytest.mark.processes
def test_the_memory_of_a_finished_run_is_written(tiny: Path, tmp_path: Path) -> None:
    peaks = tmp_path / "peaks.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu/train_measured.py", str(tiny), "--train.steps", "4"], cwd=ROOT,
        env=clean_env() | {"MEASURED_TO": str(peaks), "PYTHONPATH": str(ROOT)}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == FINISHED, done.stderr
    assert json.loads(peaks.read_text())["resident"] > 10**8
