"""Train some steps in a process group of one rank, with NCCL on a GPU and gloo on a CPU; print figures as JSON.

    python benchmarks/gpu/one_rank.py --section.key value...

`hpcgpt train` on one rank has no group, whatever parallel.mode says. Here ddp, zero1 and fsdp call their collectives.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from hpcgpt import plan
from hpcgpt.checkpoint.save import local_state_dict
from hpcgpt.config import sources
from hpcgpt.distributed import world
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.training.engine import Engine


def main() -> None:
    settings = sources.from_command_line(sys.argv[1:], "one_rank", __doc__ or "")
    alone = World(0, 0, 1, 1, "alone", "benchmark")
    device = world.pick_device(alone, settings.run.device)
    torch.set_num_threads(settings.run.threads or 1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=120),
        device_id=device if backend == "nccl" else None,
    )  # fmt: skip
    group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    ranks = Ranks(alone, device, group)
    engine = Engine(plan.make(settings, 1), ranks)
    engine.warm_up()
    rows = [engine.read(engine.launch(step, step)) for step in range(settings.train.steps)]
    state = local_state_dict(engine.model.gpt, engine.optimizer, ranks)
    found = {
        "backend": backend, "module": type(engine.model.module).__name__, "tensors_to_save": len(state),
        "losses": [row["train/loss"] for row in rows], "step_s": rows[-1]["train/step_s"],
    }  # fmt: skip
    print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
