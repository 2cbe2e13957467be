"""hpcgpt.training.checkpointer: what the end of a save means for the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from tests.programs import command


@pytest.mark.processes
def test_a_start_without_a_step_records_no_save(config: Path, run: Path) -> None:
    """Its checkpoint exists: its milliseconds as the time of a save would be too short a lead for later attempts."""
    before = [event for event in run_folder.events(run) if event["event"] == "save"]
    assert [event["step"] for event in before] == [4, 8, 12]
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent))
    assert done.returncode == FINISHED, done.stderr
    assert "nothing to do" in done.stdout
    assert [event for event in run_folder.events(run) if event["event"] == "save"] == before
    ended = run_folder.read_exit(run)
    assert ended is not None
    assert (ended.step, ended.saved) == (12, True)
