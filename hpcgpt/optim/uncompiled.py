"""torch's optimizers without torch's compiler.

The first call of a method of a torch optimizer imports ``torch._dynamo``, which keeps the call out of compiled code: a
second of CPU time at each start. Here an optimizer is never part of compiled code, so its methods are torch's functions
without that decorator. (`hpcgpt.distributed.eager_ddp` does the same for DDP. FSDP imports the compiler.)
"""

from __future__ import annotations

from inspect import unwrap

import torch


class Optimizer(torch.optim.Optimizer):
    """Base of optimizers that define their own step."""

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch.optim.AdamW: the same arguments, state and bits; without ``differentiable``."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
