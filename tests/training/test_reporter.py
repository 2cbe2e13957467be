"""hpcgpt.training.reporter: what rank 0 prints and writes; the files themselves are the business of other tests."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.run import metrics_file, run_folder
from hpcgpt.storage import lease
from hpcgpt.training.reporter import AttemptInfo, Reporter
from tests.one_rank import ALONE
from tests.run.test_metrics_file import row


class Clock:
    """The module `time`, with a monotonic clock that can be put forward."""

    ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def test_after_a_rollback_the_time_left_is_that_of_the_steps_since(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt began at step 900, and a spike takes it back to step 100."""
    monkeypatch.setattr(metrics_file, "LINE_EVERY_S", 0.0)
    clock = Clock()
    monkeypatch.setattr(metrics_file, "time", clock)
    config = sources.from_command_line([str(tiny), "--train.steps", "1000"], "train", "")
    run_folder.prepare(config.run_folder)
    with lease.acquire(config.run_folder, "") as held:
        info = AttemptInfo(plan.make(config, 1), ALONE, held.number, ["n1"], 1, torch.float32, time.time(), 900, False)
        reporter = Reporter(info, held)
        reporter.row(row(901))
        clock.ahead_s = 1e6
        reporter.roll_back(100, row(902), 2)
        reporter.row(row(101))
        reporter.row(row(102))
        reporter.close(1)
    left = re.findall(r"step (\d+)/1,000 .* (\S+) left\n", capsys.readouterr().out)
    assert [step for step, _ in left] == ["901", "101", "102"]
    for _, clock in left[1:]:
        hours, minutes, seconds = map(int, clock.split(":"))
        # With the 10^6 s since the start, and one step, it would be 9 * 10^8 s.
        assert 3600 * hours + 60 * minutes + seconds < 1e8
