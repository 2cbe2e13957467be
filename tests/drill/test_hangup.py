"""hpcgpt.drill, when its terminal is gone: a lost ssh session sends SIGHUP, and what is printed then fails with EIO."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env

LIMIT_S = 60.0


@pytest.mark.processes
def test_a_drill_that_loses_its_terminal_cleans_up_and_reports(tmp_path: Path) -> None:
    home = tmp_path / "drill"
    drill = [sys.executable, "-m", "hpcgpt.drill", "--on", "here", "--ranks", "1", "--minutes", "1", "--dir", str(home)]
    terminal, its_end = pty.openpty()
    started = subprocess.Popen(["setsid", "--ctty", *drill], cwd=ROOT, env=clean_env(), stdin=its_end, stdout=its_end,
                               stderr=its_end)  # fmt: skip
    os.close(its_end)
    log, give_up_at = home / "drill.log", time.monotonic() + LIMIT_S
    while not log.exists() or "the drill's folder is" not in log.read_text():
        assert started.poll() is None
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    os.close(terminal)
    try:
        assert started.wait(LIMIT_S) == 130
    finally:
        started.kill()
    (report,) = home.glob("drill-seed*.md")
    assert "interrupted" in report.read_text()
    assert str(home) not in Path("/proc/mounts").read_text()
