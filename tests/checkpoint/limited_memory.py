"""The program of test_load under a limit of memory: ``-m tests.checkpoint.limited_memory RUN_FOLDER LIMIT``.

It saves a checkpoint of some hundred MB, and resumes from it once LIMIT (getrlimit(2): RLIMIT_AS or RLIMIT_DATA) allows
a part of that beside the model and the optimizer, which are there already.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from hpcgpt.checkpoint import load
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import local_state_dict
from hpcgpt.config.options import Model, Optim
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.storage.lease import acquire
from tests.checkpoint.small_checkpoints import IDENTITY, save_tensors
from tests.one_rank import ALONE

ROOM = 48 << 20  # bytes
FIELDS = {"RLIMIT_AS": 0, "RLIMIT_DATA": 5}  # of /proc/self/statm: what counts against it


def main(folder: Path, limit: str) -> None:
    torch.set_num_threads(1)
    model = GPT(Model(n_layer=1, n_head=1, n_embd=64, block_size=16, vocab_size=1 << 18), seed=1)
    optimizer = make_optimizer(model, Optim())
    ids = torch.arange(16).view(1, 16)
    model(ids, ids).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    held = acquire(folder, "")
    (folder / "checkpoints").mkdir()
    before = {name: tensor.clone() for name, tensor in local_state_dict(model, optimizer, ALONE).items()}
    assert save_tensors(folder / "checkpoints", State(1, 16, 1, 1, IDENTITY), before, held) == ""
    assert sum(path.stat().st_size for path in folder.glob("checkpoints/*/*")) > 3 * ROOM
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    counted = int(Path("/proc/self/statm").read_text().split()[FIELDS[limit]]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(getattr(resource, limit), (counted + ROOM, resource.RLIM_INFINITY))
    path = load.newest_valid(folder / "checkpoints", ALONE, held)
    assert path is not None
    load.load(path, model, optimizer, ALONE)
    after = local_state_dict(model, optimizer, ALONE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    held.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
