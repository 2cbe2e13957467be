"""The program of test_fake_step that trains a step with each of some settings, each in a process of its own, and prints
which of them have loaded torch's compiler: ``-m tests.estimate.compiler_loads SETTINGS``.

SETTINGS is a JSON list of values by key, as {"train.loss_chunk": 16}; what is printed is a list of as many booleans.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch

from hpcgpt.config.options import Config, Model, Train
from hpcgpt.estimate import fitting
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.optim.optimizer import make_optimizer

CONFIG = Config(
    model=Model(n_layer=1, n_head=1, n_embd=32, block_size=32, vocab_size=64),
    train=Train(micro_batch=2, global_batch=2, dtype="float32"),
)
LOADED, NOT_LOADED = 10, 11  # exit statuses


def loaded_after_a_step(config: Config) -> bool:
    device = torch.device("cpu")
    gpt = GPT(config.model, options=ForwardOptions.from_config(config, 0))
    optimizer = make_optimizer(gpt, config.optim)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with kernels.deterministic(nullcontext, device)() if config.train.deterministic else nullcontext():
        gpt(ids, ids).backward()
        optimizer.step()
    return "torch._dynamo" in sys.modules


def main(wanted: list[dict[str, Any]]) -> None:
    found = []
    for values in wanted:
        if os.fork() == 0:
            os._exit(LOADED if loaded_after_a_step(fitting.with_values(CONFIG, values)) else NOT_LOADED)
        status = os.waitstatus_to_exitcode(os.wait()[1])
        assert status in (LOADED, NOT_LOADED), f"{values}: status {status}"
        found.append(status == LOADED)
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
