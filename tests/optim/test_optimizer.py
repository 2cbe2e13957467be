"""hpcgpt.optim.optimizer: AdamW with the configured betas, and weight decay where configured."""

from __future__ import annotations

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
