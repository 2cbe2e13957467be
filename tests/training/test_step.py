"""hpcgpt.training.step: a step on any number of ranks is the step of one process on the whole batch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from hpcgpt.training.step import to_inputs_and_targets
from tests.one_rank import ALONE
from tests.programs import on_ranks
from tests.training import ranks_step

NEAR = {"fp32": 1e-6, "fp64": 1e-12}


@dataclass(frozen=True)
class Reports:
    """What the ranks of one world reported, by rank, and the gradients of rank 0."""

    ranks: list[dict[str, Any]]
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def reports(request: pytest.FixtureRequest, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    out = tmp_path_factory.mktemp("ranks")
    done = on_ranks(request.param, "tests.training.ranks_step", str(shards_folder), str(out))
    assert done.returncode == 0, done.stderr
    reports = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(request.param)]
    return Reports(reports, load_file(out / "gradients.safetensors"))


@pytest.fixture(scope="module")
def whole_batch(shards_folder: Path) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of the whole global batch in one pass of one process, from torch alone."""
    found = {}
    for name, dtype in ranks_step.DTYPES.items():
        bench = ranks_step.Bench(ALONE, shards_folder, 1, dtype)
        inputs, targets = to_inputs_and_targets(bench.loader.batch(3, 0), ALONE.device)
        assert inputs.shape == (16, 32)
        loss = F.cross_entropy(bench.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        found[name] = loss.detach(), {key: p.grad for key, p in bench.model.named_parameters() if p.grad is not None}
    return found


@pytest.mark.processes
@pytest.mark.parametrize("micro_steps", ranks_step.ACCUMULATIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_gradient_is_that_of_one_process_on_the_whole_batch(
    reports: Reports, whole_batch: dict[str, tuple[Tensor, dict[str, Tensor]]], precision: str, micro_steps: int
) -> None:
    _, expected = whole_batch[precision]
    for name, gradient in expected.items():
        difference = reports.gradients[f"{precision}/{micro_steps}/{name}"] - gradient
        assert difference.abs().max() < NEAR[precision], name
        assert gradient.abs().max() > 1e-4, f"{name}: the gradient is too small for a meaningful comparison"
    assert len(reports.gradients) == len(expected) * 6


@pytest.mark.processes
@pytest.mark.parametrize("micro_steps", ranks_step.ACCUMULATIONS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_logged_loss_is_the_mean_over_the_global_batch_on_every_rank(
    reports: Reports, whole_batch: dict[str, tuple[Tensor, dict[str, Tensor]]], precision: str, micro_steps: int
) -> None:
    losses = {rank["gradients"][f"{precision}/{micro_steps}"]["loss"] for rank in reports.ranks}
    assert len(losses) == 1
    assert losses.pop() == pytest.approx(whole_batch[precision][0].item(), rel=NEAR[precision])


@pytest.mark.processes
def test_every_rank_has_the_same_gradient_and_norm(reports: Reports) -> None:
    assert all(rank["gradients"] == reports.ranks[0]["gradients"] for rank in reports.ranks)


@pytest.mark.processes
def test_the_norm_is_the_one_before_clipping(reports: Reports, whole_batch: dict[str, Any]) -> None:
    for precision, (_, gradients) in whole_batch.items():
        expected = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        for micro_steps in ranks_step.ACCUMULATIONS:
            norm = reports.ranks[0]["gradients"][f"{precision}/{micro_steps}"]["norm"]
            assert norm == pytest.approx(expected, rel=10 * NEAR[precision])


@pytest.mark.processes
def test_after_forty_steps_the_parameters_are_the_same_bytes_on_every_rank(reports: Reports) -> None:
    assert len({rank["forty"]["digest"] for rank in reports.ranks}) == 1


@pytest.mark.processes
def test_the_norm_of_each_of_forty_steps_is_the_same_on_every_rank(reports: Reports) -> None:
    assert all(rank["forty"]["norms"] == reports.ranks[0]["forty"]["norms"] for rank in reports.ranks)
    assert len(set(reports.ranks[0]["forty"]["norms"])) == 40


@pytest.mark.processes
def test_every_step_is_clipped_from_the_first_on(reports: Reports) -> None:
    forty = reports.ranks[0]["forty"]
    assert min(forty["norms"]) > 0.05
    assert forty["used"] == pytest.approx([0.05] * 40, rel=1e-4)


@pytest.mark.processes
def test_a_step_has_one_gradient_all_reduce_however_many_micro_steps(reports: Reports, shards_folder: Path) -> None:
    model = ranks_step.Bench(ALONE, shards_folder, 1, torch.float32).model
    everything = sum(parameter.numel() for parameter in model.parameters())
    for rank in reports.ranks:
        # The 1 is the loss that is logged.
        assert rank["reductions"] == [everything, 1] * len(ranks_step.ACCUMULATIONS)


@pytest.mark.processes
def test_gradients_are_views_of_the_communication_buckets(reports: Reports) -> None:
    for rank in reports.ranks:
        assert rank["in_buckets"] == [True, True, True]


def test_one_rank_gives_the_same_numbers(
    shards_folder: Path, whole_batch: dict[str, tuple[Tensor, dict[str, Tensor]]]
) -> None:
    figures, gradients = ranks_step.gradients(ALONE, shards_folder)
    for precision, (loss, expected) in whole_batch.items():
        for micro_steps in ranks_step.ACCUMULATIONS:
            name = f"{precision}/{micro_steps}"
            assert figures[name]["loss"] == pytest.approx(loss.item(), rel=NEAR[precision])
            for key, gradient in expected.items():
                assert (gradients[f"{name}/{key}"] - gradient).abs().max() < NEAR[precision]


def test_without_a_limit_the_norm_is_measured_and_nothing_is_clipped(shards_folder: Path) -> None:
    bench = ranks_step.Bench(ALONE, shards_folder, 1, torch.float64)
    _, norm = bench.step(0, clip_norm=0)
    assert torch.nn.utils.get_total_norm(bench.used_gradients.values()).item() == pytest.approx(norm.item(), rel=1e-12)


def test_a_step_uses_the_given_rate_and_leaves_no_gradient(shards_folder: Path) -> None:
    bench = ranks_step.Bench(ALONE, shards_folder, 2, torch.float64)
    bench.optimizer.param_groups[0]["weight_decay"] = 0.0
    before = {name: p.detach().clone() for name, p in bench.model.named_parameters()}
    bench.step(0, clip_norm=1.0)
    # AdamW's first step moves every parameter that has a gradient by the learning rate.
    moved = torch.cat([(p.detach() - before[name]).abs().flatten() for name, p in bench.model.named_parameters()])
    assert moved.max().item() == pytest.approx(1e-3, rel=1e-3)
    assert all(parameter.grad is None for parameter in bench.model.parameters())
