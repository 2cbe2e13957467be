"""A group of one rank, on the CPU, for tests of what ranks do together."""

from __future__ import annotations

import torch

from hpcgpt.distributed import world
from hpcgpt.distributed.world import Ranks

ALONE = Ranks(world.World(0, 0, 1, 1, "alone", "test"), torch.device("cpu"), None)
