"""hpcgpt.training.engine: each step follows the configuration, and its row says what it was. One rank here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcgpt import plan
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.training.engine import Engine
from tests.one_rank import ALONE
from tests.training.ranks_parallel import settings


def changed(configuration: Config, **options: Any) -> Config:
    """Return the configuration with other options, spelled section__key=value."""
    for name, value in options.items():
        section, _, key = name.partition("__")
        part = dataclasses.replace(getattr(configuration, section), **{key: value})
        configuration = dataclasses.replace(configuration, **{section: part})
    return configuration


def make_engine(shards: Path, ranks: Ranks = ALONE, **options: Any) -> Engine:
    return Engine(plan.make(changed(settings(shards), **options), ranks.world.size), ranks)


def test_each_step_has_its_own_learning_rate_of_the_schedule(shards_folder: Path) -> None:
    engine, used = make_engine(shards_folder), []
    engine.optimizer.register_step_pre_hook(lambda *_: used.append(engine.optimizer.param_groups[0]["lr"]))
    steps = (0, 1, 5, 120)
    rows = [engine.read(engine.launch(step, batch=3)) for step in steps]
    assert used == [row["train/lr"] for row in rows]
    assert used == [learning_rate(step, 200, settings(shards_folder)) for step in steps]
    assert [row["step"] for row in rows] == [step + 1 for step in steps]


def test_gradients_are_clipped_to_the_configured_norm(shards_folder: Path) -> None:
    engine, used = make_engine(shards_folder, optim__clip_norm=0.03), []

    def record(*_: object) -> None:
        used.append(
            float(nn.utils.get_total_norm([p.grad for p in engine.model.gpt.parameters() if p.grad is not None]))
        )

    engine.optimizer.register_step_pre_hook(record)
    assert engine.read(engine.launch(0, 0))["train/grad_norm"] > 0.1
    assert used == [pytest.approx(0.03, rel=1e-3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_pass_computes_in_the_configured_precision(shards_folder: Path, dtype: str) -> None:
    engine, seen = make_engine(shards_folder, train__dtype=dtype), set()
    engine.model.gpt.blocks[1].register_forward_hook(
        lambda module, _, __: seen.add(module.mlp.up(torch.ones(1, 32)).dtype)
    )
    engine.read(engine.launch(0, 0))
    assert seen == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in engine.model.gpt.parameters()} == {torch.float32}


def test_the_seed_decides_the_first_weights_and_the_order_of_the_samples(shards_folder: Path) -> None:
    first, other = (make_engine(shards_folder, run__seed=seed) for seed in (3, 4))
    expected = GPT(first.model.gpt.config, seed=3)
    assert all(map(torch.equal, first.model.gpt.state_dict().values(), expected.state_dict().values()))
    assert not torch.equal(first.model.gpt.head.weight, other.model.gpt.head.weight)
    assert not torch.equal(first.loader.batch(0, 0), other.loader.batch(0, 0))


def test_the_stride_and_the_document_mask_are_the_configured_ones(shards_folder: Path) -> None:
    configuration = changed(settings(shards_folder), data__stride=8, data__document_mask=True, optim__z_loss=0.5)
    planned = plan.make(configuration, 1)
    engine = Engine(planned, ALONE)
    samples = planned.sets[0].windows
    assert (
        samples
        == sum(part.count for part in engine.loader.mixture.sets)
        > 3 * plan.make(settings(shards_folder), 1).sets[0].windows
    )
    assert engine.model.gpt.options == ForwardOptions.from_config(
        configuration, planned.sets[0].manifest.tokenizer["end_of_text"]
    )


@pytest.mark.parametrize("ranks", [1, 4])
def test_mfu_is_the_achieved_fraction_of_the_peak_of_all_ranks(shards_folder: Path, ranks: int) -> None:
    engine = make_engine(
        shards_folder, Ranks(world.World(0, 0, ranks, ranks, "alone", "test"), torch.device("cpu"), None)
    )
    assert "train/mfu" not in engine.read(engine.launch(0, 0)), "this device has no known peak"
    engine._peak_flops = 2e12
    row = engine.read(engine.launch(1, 1))
    assert row["train/tokens_per_s"] * row["train/step_s"] == pytest.approx(16 * 32)
    needed = 16 * 32 * engine.model.gpt.flops_per_token()
    assert row["train/mfu"] == pytest.approx(needed / (row["train/step_s"] * ranks * 2e12))


def test_warming_up_is_one_forward_and_backward_pass_without_effects(shards_folder: Path) -> None:
    """It puts DDP's buckets in their final order: a resumed run then sums in the order of an uninterrupted one."""
    engine = make_engine(shards_folder)
    passes: list[Any] = []
    before = [parameter.detach().clone() for parameter in engine.model.gpt.parameters()]
    engine.model.gpt.norm.weight.register_post_accumulate_grad_hook(passes.append)
    engine.warm_up()
    assert len(passes) == 1
    assert all(parameter.grad is None for parameter in engine.model.gpt.parameters())
    assert all(map(torch.equal, before, engine.model.gpt.parameters()))
    assert not engine.optimizer.state
