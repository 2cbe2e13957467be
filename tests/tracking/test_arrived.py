"""hpcgpt.tracking.arrived: lines of an offline run are found whatever bytes wandb's reader prints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hpcgpt.tracking import arrived

# In place of Python with wandb: Windows' 1252 in a name of a run, and UTF-8 in a text.
READER = r"""#!/bin/sh
printf '{"run": "\200"}\n{"history": {"item": {"step": 1, "time": 2.5, "sample": "\303\251"}}}\n'
"""


@pytest.mark.processes
def test_what_wandbs_reader_prints_may_have_any_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = tmp_path / "reader"
    reader.write_text(READER)
    reader.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(reader))
    assert list(arrived._history(tmp_path / "run.wandb")) == [("samples.jsonl", 1, 2.5, None)]


def test_only_offline_runs_with_the_id_are_parts_of_a_run(tmp_path: Path) -> None:
    """A copied folder has those of the original; another program may be offline in the same folder."""
    for name in ("a1", "b2", "x-a1"):
        (tmp_path / f"offline-run-20261201_101112-{name}").mkdir()
    (tmp_path / "offline-run-a1").mkdir()
    assert [path.name for path in arrived.offline_parts(tmp_path, "a1")] == ["offline-run-20261201_101112-a1"]
