"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from hpcgpt.config.options import Optim
from hpcgpt.optim.muon import Muon

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter, from its first step on
MUON_STATE = ("momentum_buffer",)


def make_optimizer(model: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), one fused kernel where torch has it; or Muon for the blocks' matrices, and
    AdamW for embeddings, head, norms and biases.

    With ``decay = "matrices"`` biases and norms do not decay, since pulling a gain towards zero is no
    regularisation; "all" decays everything. The learning rate is set anew before every step.
    """
    everything = dict(model.named_parameters())
    of_muon = [
        p for name, p in everything.items() if config.name == "muon" and name.startswith("blocks.") and p.dim() == 2
    ]
    rest = [p for p in everything.values() if not any(p is matrix for matrix in of_muon)]
    decaying = [p for p in rest if p.dim() >= 2 or config.decay == "all"]
    staying = [p for p in rest if p.dim() < 2 and config.decay != "all"]
    groups = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": staying, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    if config.name == "adamw":
        return adamw
    # As much decay a step as AdamW's: it is multiplied by the rate, and Muon's is another one.
    decay = config.weight_decay * config.lr / config.muon_lr
    muon = Muon(of_muon, config.muon_lr, config.muon_momentum, decay, adamw)
    muon.param_groups[0]["times"] = config.muon_lr / config.lr
    return muon


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give AdamW's parameters this rate, and Muon's matrices as large a part of their own peak."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)


def state_keys(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """What the optimizer keeps of each parameter, from its first step on."""
    return {
        parameter: MUON_STATE if "momentum" in group else ADAMW_STATE
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
