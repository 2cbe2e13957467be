"""The program of test_unlike_ranks on 2 ranks: ``-m tests.training.ranks_unlike OUT UNLIKE TRAIN_ARGUMENTS``.

It is `hpcgpt.train` on CPUs that say to differ in UNLIKE, on any machine: "capability": rank 1 has no vector
instructions; "bf16": rank 0 computes in bfloat16, and rank 1 does not; "": in nothing, both without it. Each rank
writes OUT/rank_R.txt: a digest of its weights after the last step.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hpcgpt import cli, train
from hpcgpt.distributed import world
from hpcgpt.distributed.sharded_tensor import local_rows
from hpcgpt.model import precision
from hpcgpt.optim import optimizer
from hpcgpt.training import engine
from hpcgpt.training.loop import Loop

if __name__ == "__main__":
    out, unlike, *arguments = sys.argv[1:]
    rank = world.discover().rank
    capability = "DEFAULT" if rank == 1 and unlike == "capability" else "AVX2"
    torch.backends.cpu.get_cpu_capability = lambda: capability
    for module in (precision, engine, optimizer):
        mock.patch.object(module, "cpu_has_bf16", lambda *_: rank == 0 and unlike == "bf16").start()
    real_run = Loop.run

    def run(self: Loop) -> Any:
        reason = real_run(self)
        digest = hashlib.sha256()
        for parameter in self.engine.model.gpt.parameters():
            digest.update(local_rows(parameter.detach()).local.numpy().tobytes())
        (Path(out) / f"rank_{rank}.txt").write_text(digest.hexdigest())
        return reason

    mock.patch.object(Loop, "run", run).start()
    sys.argv[1:] = arguments
    cli.run(train.main)
