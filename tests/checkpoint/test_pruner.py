"""hpcgpt.checkpoint.pruner: removals of two threads in one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.checkpoint import layout, retention
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.config.options import Checkpoint
from hpcgpt.storage.lease import Lease


def test_a_checkpoint_that_another_thread_has_removed_is_no_error_of_a_rollback(
    three: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start may still remove old ones, where its disk was slow: the newest goes between the look and the removal."""
    look = layout.found

    def look_and_lose_one(checkpoints: Path) -> list[Path]:
        paths = look(checkpoints)
        retention.remove(paths[0], lease)
        return paths

    monkeypatch.setattr(layout, "found", look_and_lose_one)
    Pruner(three, lease, Checkpoint(), regular=4).remove_beyond(4)
    assert [layout.step_of(path) for path in look(three)] == [4]
