"""The program of test_rendezvous: ``python -m tests.distributed.ranks_rendezvous FOLDER TIMEOUT_S``.

A rank that connects to the others as training does, and prints the sum of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from hpcgpt import cli
from hpcgpt.distributed import rendezvous, world


def main(argv: Sequence[str]) -> int:
    Path(argv[0], f"up.{os.getpid()}").touch()
    ranks = rendezvous.connect(world.discover(), torch.device("cpu"), Path(argv[0]), "auto", float(argv[1]))
    total = torch.tensor([ranks.world.rank])
    dist.all_reduce(total, group=ranks.cpu_group)
    print("met", ranks.world.rank, int(total), flush=True)
    rendezvous.disconnect()
    return 0


if __name__ == "__main__":
    cli.run(main)
