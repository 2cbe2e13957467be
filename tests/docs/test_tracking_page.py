"""docs/tracking.md: its commands can be run, and the keys that it names are those that are sent."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.distributed.node_figures import KEYS
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.tracking.dashboard import POINTS
from tests.programs import ROOT
from tests.tracking.attempts import LONG_S, Attempt, home, server

__all__ = ["home", "server"]  # fixtures

PAGE = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL) for line in block.splitlines()]


def test_every_kind_of_event_and_figure_of_a_node_is_named() -> None:
    assert [key for key in (*POINTS, *KEYS) if not re.search(rf"`(node/<host>/)?{key}`", PAGE)] == []


@pytest.mark.long
@pytest.mark.processes
def test_each_command_runs_in_the_order_of_the_page(tmp_path: Path, server: WandbServer) -> None:
    attempt = Attempt(tmp_path / "runs", "offline", name="gpt2")
    attempt.write(range(1, 6))
    attempt.tracker.close(0, LONG_S)
    for line in COMMANDS:
        if line.startswith("hpcgpt tracking"):
            words = [sys.executable, "-m", "hpcgpt.tracking", *shlex.split(line, comments=True)[2:]]
            done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
                                  capture_output=True, text=True)  # fmt: skip
            assert done.returncode == 0, done.stderr
    assert server.steps(attempt.id) == server.steps("gpt2-clean") == [1, 2, 3, 4, 5]
    assert len(list((tmp_path / "gpt2-wandb/wandb").glob("offline-run-*/*.wandb"))) == 1
