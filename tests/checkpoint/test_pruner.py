"""hpcgpt.checkpoint.pruner: removals by two threads in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.checkpoint import layout, retention
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.config.options import Checkpoint
from hpcgpt.storage.lease import Lease


def test_a_rollback_tolerates_a_checkpoint_that_another_thread_has_removed(
    three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start may still remove old ones on a slow disk: the newest disappears between listing and removal."""
    list_checkpoints = layout.found

    def list_and_lose_one(checkpoints: Path) -> list[Path]:
        paths = list_checkpoints(checkpoints)
        retention.remove(paths[0], lease)
        return paths

    monkeypatch.setattr(layout, "found", list_and_lose_one)
    Pruner(three_checkpoints, lease, Checkpoint(), regular=4).remove_beyond(4)
    assert [layout.step_of(path) for path in list_checkpoints(three_checkpoints)] == [4]
