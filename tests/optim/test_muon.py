"""hpcgpt.optim.muon: its updates equal torch's, the right parameters use it, and it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt.checkpoint import load
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import local_state_dict
from hpcgpt.config import sources
from hpcgpt.config.options import Model, Optim
from hpcgpt.model.gpt import GPT
from hpcgpt.optim import optimizer as optimizer_module
from hpcgpt.optim.muon import orthogonal
from hpcgpt.optim.optimizer import make_optimizer, set_learning_rate, state_keys
from hpcgpt.storage.lease import Lease
from tests.checkpoint.ranks_checkpoint import content
from tests.checkpoint.small_checkpoints import IDENTITY, save_tensors
from tests.one_rank import ALONE
from tests.programs import command
from tests.tiny_run import rows

MUON = Optim(name="muon", lr=1e-3, muon_lr=0.02, muon_momentum=0.95, weight_decay=0.1)


def trained(config: Optim, steps: int, seed: int = 1, tied: bool = True) -> tuple[GPT, torch.optim.Optimizer]:
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100, tied=tied), seed)
    optimizer = make_optimizer(model, config)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(step % 3))
        loss = model(ids, ids.roll(-1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


@pytest.fixture
def native_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the iteration run in bfloat16, on whatever CPU this is."""
    monkeypatch.setattr(optimizer_module, "cpu_has_bf16", lambda: True)


@pytest.mark.usefixtures("native_bfloat16")
def test_updates_equal_those_of_torchs_muon_bit_for_bit() -> None:
    model, _ = trained(MUON, 20)
    other = GPT(model.config, seed=1)
    matrices = [p for name, p in other.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
    rest = [p for p in other.parameters() if not any(p is matrix for matrix in matrices)]
    muon: Any = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.1 * 1e-3 / 0.02)
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    for step in range(20):
        ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(step % 3))
        other(ids, ids.roll(-1, 1)).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("shape", [(60, 90), (64, 256), (256, 64), (1, 30), (96, 32)])
def test_an_update_has_the_singular_vectors_of_the_matrix_and_singular_values_near_one(
    shape: tuple[int, int], native: bool
) -> None:
    """In bfloat16 if the CPUs compute in it, else in float32."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = matrix.clone()
    assert orthogonal(matrix, native).dtype == (torch.bfloat16 if native else torch.float32)
    assert torch.equal(matrix, before)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix, native).float()
    singular = torch.linalg.svdvals(made)
    assert 0.5 < singular.min() <= singular.max() < 1.3
    rotated = u.T @ made @ v.T  # diagonal if U and V are those of the matrix
    assert (rotated - rotated.diag().diag()).norm() < 0.1 * rotated.norm()


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert torch.equal(orthogonal(torch.zeros(8, 4), True), torch.zeros(8, 4, dtype=torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_the_matrices_of_the_blocks_and_nothing_else(tied: bool) -> None:
    model, optimizer = trained(MUON, 0, tied=tied)
    keys = {name: state_keys(optimizer)[p] for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        of_muon = name.startswith("blocks.") and parameter.dim() == 2
        assert keys[name] == (("momentum_buffer",) if of_muon else ("step", "exp_avg", "exp_avg_sq")), name
    assert sum(key == ("momentum_buffer",) for key in keys.values()) == 8
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_muons_rate_follows_the_schedule_with_its_own_peak() -> None:
    _, optimizer = trained(MUON, 0)
    for rate in (0.0, 5e-4, 1e-3):
        set_learning_rate(optimizer, rate)
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(20 * rate), rate, rate]


def test_a_step_moves_a_matrix_by_the_given_rate() -> None:
    model, optimizer = trained(dataclasses.replace(MUON, weight_decay=0.0), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_learning_rate(optimizer, 1e-4)
    train(model, optimizer, range(1))
    up = "blocks.0.mlp.up"
    moved = model.get_parameter(f"{up}.weight") - before[f"{up}.weight"]  # 128 x 32: the step is scaled by two
    assert 0.5 < torch.linalg.matrix_norm(moved.detach(), 2) / (2 * 0.02 * 0.1) < 1.3
    bias = model.get_parameter(f"{up}.bias") - before[f"{up}.bias"]
    assert bias.detach().abs().max().item() == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.slow
def test_muon_learns_repeated_batches() -> None:
    model, optimizer = trained(MUON, 0)
    losses = train(model, optimizer, range(60))
    assert losses[-1] < losses[0] - 1


def test_a_loaded_run_continues_like_the_saved_one(checkpoints: Path, lease: Lease) -> None:
    model, optimizer = trained(MUON, 3)
    before = content(model, optimizer, ALONE)
    assert "optim/blocks.0.mlp.up.weight/momentum_buffer" in before
    assert (
        save_tensors(checkpoints, State(3, 3, 3, 1, IDENTITY), local_state_dict(model, optimizer, ALONE), lease) == ""
    )
    other, other_optimizer = trained(MUON, 0, seed=2)
    load.load(checkpoints / "step_000000003", other, other_optimizer, ALONE)
    assert content(other, other_optimizer, ALONE) == before
    train(model, optimizer, range(3, 6))
    train(other, other_optimizer, range(3, 6))
    assert content(other, other_optimizer, ALONE) == content(model, optimizer, ALONE) != before


@pytest.mark.parametrize(("was", "now"), [(MUON, Optim()), (Optim(), MUON)], ids=["muon to adamw", "adamw to muon"])
def test_a_checkpoint_of_another_optimizer_is_refused(checkpoints: Path, lease: Lease, was: Optim, now: Optim) -> None:
    model, optimizer = trained(was, 2)
    assert (
        save_tensors(checkpoints, State(2, 2, 2, 1, IDENTITY), local_state_dict(model, optimizer, ALONE), lease) == ""
    )
    other, other_optimizer = trained(now, 0)
    with pytest.raises(ValueError, match=r"is not part of this optimizer's state .*set optim\.name as it was"):
        load.load(checkpoints / "step_000000002", other, other_optimizer, ALONE)


@pytest.mark.parametrize("flags", [["--optim.muon_lr", "0.01"], ["--optim.muon_momentum", "0.9"]], ids=" ".join)
def test_options_of_muon_are_refused_without_it(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=r"optim\.muon_\w+ has no effect with optim\.name adamw"):
        sources.from_command_line(flags, "train", "")
    sources.from_command_line([*flags, "--optim.name", "muon"], "train", "")


@pytest.mark.processes
def test_the_program_trains_with_muon(tiny: Path, tmp_path: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--optim.name", "muon")
    assert done.returncode == 0, done.stderr
    losses = [row["train/loss"] for row in rows(tmp_path / "runs/tiny/metrics.jsonl")]
    assert losses[-1] < losses[0]
