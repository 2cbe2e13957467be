"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from hpcgpt.config import Optim

STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, from its first step on


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), one fused kernel where torch has it.

    With ``decay = "matrices"`` biases and norms do not decay, since pulling a gain towards zero is no
    regularisation; "all" decays everything. The learning rate is set anew before every step.
    """
    everything = list(model.parameters())
    decaying = [p for p in everything if p.dim() >= 2 or config.decay == "all"]
    staying = [p for p in everything if p.dim() < 2 and config.decay != "all"]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": staying, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
