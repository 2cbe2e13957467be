"""Print what a rank finds of its place in the job, in one line: in place of training, in test_layouts_on_slurm.py.

The lab's GPUs are no devices that torch could count, so the GPUs that this task may see are those that Slurm lists.
"""

from __future__ import annotations

import json
import os
import socket

from hpcgpt.distributed import layout, world

here = world.discover()
layout.check(here, "auto")
visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
index = world.device_index(here, len(visible), "auto", world.allocated_gpus(os.environ))
found = {"rank": here.rank, "size": here.size, "local": f"{here.local_rank}/{here.local_size}", "by": here.launcher,
         "host": socket.gethostname(), "gpu": None if index is None else visible[index],
         "given": os.environ.get("SLURM_STEP_GPUS", "").split(",")}  # fmt: skip
print(json.dumps(found), flush=True)
