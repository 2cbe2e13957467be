"""hpcgpt.optim.optimizer and uncompiled: AdamW as configured, with torch's bits and without its compiler."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

import pytest
import torch

from hpcgpt.config.options import Optim
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from tests.model.test_gpt import SMALL


@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_with_zero_gradients_only_decayed_parameters_move(decay: Literal["matrices", "all"]) -> None:
    model = GPT(SMALL)
    optimizer = make_optimizer(model, Optim(lr=0.5, weight_decay=0.2, decay=decay))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            parameter.add_(0.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        left = 0.9 if parameter.dim() == 2 or decay == "all" else 1.0
        assert (parameter - left * before[name]).abs().max() < 1e-6, name


def test_the_moving_averages_use_the_betas_and_epsilon_is_the_papers() -> None:
    model = GPT(SMALL)
    optimizer = make_optimizer(model, Optim(lr=0.5, weight_decay=0.0, beta1=0.75, beta2=0.5))
    weight = model.norm.weight
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-8)
    optimizer.step()
    # Kingma and Ba, "Adam", 2015: gradient / (|gradient| + epsilon), which is half of the rate here.
    assert weight.detach().mean().item() == pytest.approx(1 - 0.25, rel=1e-5)
    state = optimizer.state[weight]
    assert state["exp_avg"].mean().item() == pytest.approx(0.25 * 1e-8, rel=1e-5)
    assert state["exp_avg_sq"].mean().item() == pytest.approx(0.5 * 1e-16, rel=1e-5)


def test_adamw_has_the_bits_of_torchs() -> None:
    weights = []
    for of_torch in (False, True):
        torch.manual_seed(1)
        model = GPT(SMALL)
        optimizer = make_optimizer(model, Optim(lr=0.01))
        if of_torch:
            groups = [{"params": group["params"], "weight_decay": group["weight_decay"]}
                      for group in optimizer.param_groups]  # fmt: skip
            optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            assert model.norm.weight.grad is None
        weights.append([parameter.detach().numpy().tobytes() for parameter in model.parameters()])
    assert weights[0] == weights[1]


@pytest.mark.processes
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_does_not_import_the_compiler(name: str) -> None:
    """Importing it takes a second of each start."""
    code = f"""
import sys
from hpcgpt.config.options import Optim
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from tests.model.test_gpt import SMALL
model = GPT(SMALL)
optimizer = make_optimizer(model, Optim(name="{name}"))
for parameter in model.parameters():
    parameter.grad = parameter.detach().clone()
optimizer.step()
optimizer.zero_grad(set_to_none=True)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
