"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from hpcgpt.config.options import Optim
from hpcgpt.model.precision import cpu_has_bf16
from hpcgpt.optim.muon import Muon
from hpcgpt.optim.uncompiled import AdamW

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter, from its first step on
MUON_STATE = ("momentum_buffer",)


def make_optimizer(model: nn.Module, config: Optim, cpus_have_bf16: bool | None = None) -> torch.optim.Optimizer:
    """Make AdamW (Loshchilov and Hutter, 2019; fused), or Muon for the blocks' matrices and AdamW for the other
    parameters.

    With ``decay = "matrices"`` biases and norms do not decay, since pulling a gain towards zero does not regularize;
    "all" decays everything. The learning rate is set before every step. `cpus_have_bf16`: whether the CPUs of all ranks
    compute in bfloat16; None: there is only this one.
    """
    named = dict(model.named_parameters())
    of_muon = [p for name, p in named.items() if config.name == "muon" and name.startswith("blocks.") and p.dim() == 2]
    rest = [p for p in named.values() if not any(p is matrix for matrix in of_muon)]
    with_decay = [p for p in rest if p.dim() >= 2 or config.decay == "all"]
    without_decay = [p for p in rest if p.dim() < 2 and config.decay != "all"]
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]
    adamw = AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    if config.name == "adamw":
        return adamw
    # Decay is multiplied by the learning rate, so Muon's is scaled to decay as much per step as AdamW's.
    decay = config.weight_decay * config.lr / config.muon_lr
    has_bf16 = cpu_has_bf16() if cpus_have_bf16 is None else cpus_have_bf16
    muon = Muon(
        of_muon, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=decay, others=adamw,
        cpus_have_bf16=has_bf16,
    )  # fmt: skip
    muon.param_groups[0]["times"] = config.muon_lr / config.lr
    return muon


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set AdamW's learning rate to `rate`, and Muon's to the same fraction of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1.0)


def state_keys(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """Return the names of each parameter's optimizer state."""
    return {
        parameter: MUON_STATE if "momentum" in group else ADAMW_STATE
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
