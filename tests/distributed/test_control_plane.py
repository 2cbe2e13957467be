"""What ranks cost each other, counted by benchmarks/control_plane.py at two sizes: nothing grows with the square."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.programs import ROOT, clean_env

SMALL, LARGE = 8, 32


@pytest.mark.processes
def test_a_rank_costs_the_logarithm_of_their_number_and_all_of_them_no_more_than_their_number(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/control_plane.py", "--ranks", f"{SMALL},{LARGE}", "--json", "counted.json"]
    done = subprocess.run(
        [*command[:-1], str(tmp_path / command[-1])], cwd=ROOT, env=clean_env() | {"PYTHONPATH": os.fspath(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted: dict[str, dict[str, Any]] = json.loads((tmp_path / "counted.json").read_text())["counted"]
    small, large = counted[str(SMALL)], counted[str(LARGE)]
    for size, found in ((SMALL, small), (LARGE, large)):
        assert found["descriptors, most"] <= 64 + math.log2(size)
        assert found["messages_to_store, most"] <= 20 + 4 * math.log2(size)
    assert large["descriptors of the store's process"] >= LARGE, "rank 0 does not serve it"
    more = LARGE / SMALL
    for name in ("messages", "bytes", "messages_to_store", "bytes_to_store", "looks_a_minute"):
        assert large[f"{name}, all"] <= 1.5 * more * small[f"{name}, all"], name
        if name != "bytes":  # those of the names and results that rank 0 gathers from all
            assert large[f"{name}, most"] <= math.log2(LARGE) / math.log2(SMALL) * 1.2 * small[f"{name}, most"], name
