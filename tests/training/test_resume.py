"""hpcgpt.training.resume: what a rollback waits for. test_spikes.py has whole runs that roll back."""

from __future__ import annotations

import json
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
from tests.checkpoint.small_checkpoints import flip_byte, write_manifest
from tests.one_rank import ALONE


def rollback_in(checkpoints: Path, lease: Lease, pruning: Pruner, every: int) -> Rollback:
    restorer: Any = SimpleNamespace(
        ranks=ALONE,
        state=TrainState(),
        checkpoints=checkpoints,
        lease=lease,
        patience=nullcontext,
        plan=SimpleNamespace(config=Config()),
    )
    checkpointer: Any = SimpleNamespace(pruner=pruning, is_regular=lambda step: step % every == 0)
    return Rollback(restorer, checkpointer, SpikeDetector(Config().spike), None)


def test_a_rollback_chooses_its_checkpoint_after_the_removals_of_the_start(
    three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start removes old checkpoints in a thread, here on a slow disk."""
    monkeypatch.setattr(pruner, "WAIT_S", 600.0)
    disk_answers = threading.Event()
    monkeypatch.setattr(retention, "prune", lambda *_, **__: disk_answers.wait())
    pruning = Pruner(three_checkpoints, lease, Checkpoint(), regular=4)
    pruning.loaded(three_checkpoints / "step_000000012")
    rollback = rollback_in(three_checkpoints, lease, pruning, every=4)
    chosen: list[Path | None] = []
    choosing = threading.Thread(target=lambda: chosen.append(rollback.target(13)), daemon=True)
    choosing.start()
    choosing.join(1)
    assert not chosen
    disk_answers.set()
    choosing.join()
    assert chosen == [three_checkpoints / "step_000000012"]


@pytest.mark.parametrize("how", ["damaged", "of another version"])
def test_without_a_valid_regular_checkpoint_a_spike_is_only_reported(
    three_checkpoints: Path, lease: Lease, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run is healthy, and has valid checkpoints that were saved because a job had to stop."""
    regular = three_checkpoints / "step_000000008"
    if how == "damaged":
        flip_byte(regular)
    else:
        write_manifest(regular, json.loads((regular / "manifest.json").read_text()) | {"version": 99})
    pruning = Pruner(three_checkpoints, lease, Checkpoint(), regular=8)
    assert rollback_in(three_checkpoints, lease, pruning, every=8).target(13) is None
    assert ("is damaged" if how == "damaged" else "format version 99") in capfd.readouterr().err
    assert regular.exists() == (how != "damaged"), "what may be whole is not set aside"
