"""hpcgpt.training.resume: what a rollback waits for. test_spikes.py has whole runs that roll back."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcgpt.checkpoint import pruner, retention
from hpcgpt.checkpoint.layout import TrainState
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.config.options import Checkpoint, Config
from hpcgpt.storage.lease import Lease
from hpcgpt.training.resume import Rollback
from hpcgpt.training.spikes import SpikeDetector
from tests.one_rank import ALONE


def test_a_rollback_chooses_its_checkpoint_after_the_removals_of_the_start(
    three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start removes old checkpoints in a thread, here on a slow disk."""
    monkeypatch.setattr(pruner, "WAIT_S", 600.0)
    disk_answers = threading.Event()
    monkeypatch.setattr(retention, "prune", lambda *_, **__: disk_answers.wait())
    pruning = Pruner(three_checkpoints, lease, Checkpoint(), regular=4)
    pruning.loaded(three_checkpoints / "step_000000012")
    restorer: Any = SimpleNamespace(
        ranks=ALONE,
        state=TrainState(),
        checkpoints=three_checkpoints,
        lease=lease,
        patience=nullcontext,
        plan=SimpleNamespace(config=Config()),
    )
    checkpointer: Any = SimpleNamespace(pruner=pruning, is_regular=lambda step: step % 4 == 0)
    rollback = Rollback(restorer, checkpointer, SpikeDetector(Config().spike), None)
    chosen: list[Path | None] = []
    choosing = threading.Thread(target=lambda: chosen.append(rollback.target(13)), daemon=True)
    choosing.start()
    choosing.join(1)
    assert not chosen
    disk_answers.set()
    choosing.join()
    assert chosen == [three_checkpoints / "step_000000012"]
