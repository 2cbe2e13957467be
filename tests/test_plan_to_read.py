"""hpcgpt.plan.open_to_read: the shards of a run are read whatever its other options ask of a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hpcgpt import plan
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError


@pytest.fixture
def trained(config: Path) -> tuple[Config, State]:
    """The configuration of a run on two ranks, and the state of a checkpoint."""
    settings = sources.from_command_line([str(config), "--parallel.gradient_dtype", "bfloat16"], "train", "")
    return settings, State(4, 1024, 32, 2, plan.make(settings, world_size=2).identity)


def test_what_only_training_needs_is_not_asked_for(trained: tuple[Config, State]) -> None:
    """Gradients in bfloat16, which one rank refuses; a deleted run, task and checkpoint; a batch not divisible."""
    settings, state = trained
    gone = replace(
        settings,
        run=replace(settings.run, init_from="/there/is/none"),
        eval=replace(settings.eval, every=0, tasks=("/there/is/none.jsonl",), tasks_every=6),
        checkpoint=replace(settings.checkpoint, step=2),
        train=replace(settings.train, micro_batch=3),
    )
    planned = plan.open_to_read(gone, state, validation=True)
    assert planned.sets[0].val is not None
    assert planned.config.train == gone.train
    assert plan.open_to_read(gone, state, validation=False).sets[0].val is None


def test_imported_weights_are_evaluated_on_fewer_windows_than_a_batch(trained: tuple[Config, State]) -> None:
    settings, state = trained
    settings = replace(settings, train=replace(settings.train, global_batch=1 << 20))
    with pytest.raises(UserError, match="fewer than one global batch"):
        plan.make(settings, world_size=2)
    model = {key: value for key, value in state.identity.items() if key.startswith("model.")}
    assert plan.open_to_read(settings, State(0, 0, 0, 1, model), validation=True).sets[0].val is not None


def test_other_shards_or_another_order_are_refused(trained: tuple[Config, State]) -> None:
    settings, state = trained
    other = replace(settings, run=replace(settings.run, seed=77), train=replace(settings.train, global_batch=4))
    with pytest.raises(UserError, match=r"other data or settings: run\.seed was 1 .*; train\.global_batch was 8 and"):
        plan.open_to_read(other, state, validation=True)
