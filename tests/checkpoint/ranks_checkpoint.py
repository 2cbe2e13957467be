"""The program of test_save on 2 ranks: ``torchrun -m tests.checkpoint.ranks_checkpoint RUN_FOLDER [SMALL_DISK]``.

Each rank writes RUN_FOLDER/rank_R.json. SMALL_DISK has no room for a checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from hpcgpt.checkpoint import load
from hpcgpt.checkpoint import save as checkpoint_save
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import Saver
from hpcgpt.config import options
from hpcgpt.config.options import Model, Optim
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.run import run_folder
from hpcgpt.storage.background import Work
from hpcgpt.storage.lease import Lease, acquire


def trained(seed: int, steps: int = 2) -> tuple[GPT, torch.optim.Optimizer]:
    """Return a model and its optimizer after some steps on random tokens; the same on every rank."""
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100), seed)
    optimizer = make_optimizer(model, Optim())
    ids = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        model(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def content(model: GPT, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, bytes]:
    """Return every byte of a rank's state that a checkpoint keeps."""
    found = checkpoint_save.local_state_dict(model, optimizer, ranks)
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def measure(ranks: Ranks, lease: Lease | None, folder: Path, full: Path | None) -> dict[str, Any]:
    report: dict[str, Any] = {}
    savers: dict[Path, Saver] = {}
    rank = ranks.world.rank
    model, optimizer = trained(seed=1)
    torch.manual_seed(100 + rank)
    before = content(model, optimizer, ranks)
    state = State(4, 400, 40, ranks.world.size, {"model.n_layer": 2}, {"step": 4, "train/loss": 0.1 + 0.2})

    def save(to: Path, number: int) -> str:
        numbered = State(number, 400, 40, ranks.world.size, state.identity, state.pending)
        saver = savers.setdefault(to, Saver(to, ranks, lease, options.Checkpoint()))
        saved = saver.begin(numbered, checkpoint_save.local_state_dict(model, optimizer, ranks)) or saver.finish(
            lambda: None
        )
        assert saved is not None
        return saved.problem

    report["saved"] = save(folder / "checkpoints", 4)
    report["rng"] = before[f"rng/{rank}/cpu"].hex()

    other, other_optimizer = trained(seed=2, steps=1)
    torch.manual_seed(7)
    chosen = load.newest_valid(folder / "checkpoints", ranks, lease)
    assert chosen is not None
    report["chosen"] = chosen.name
    report["state"] = load.load(chosen, other, other_optimizer, ranks) == state
    report["same"] = content(other, other_optimizer, ranks) == before

    if full:
        report["full"] = save(full, 8)

    # Only rank 1 may not write: a limit of its process stands in for a quota.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    report["one_rank_fails"] = save(folder / "checkpoints", 8)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    report["names"] = sorted(path.name for path in (folder / "checkpoints").iterdir())
    report["retried"] = save(folder / "checkpoints", 8)
    report["over limit"] = over_limit(ranks, lease, folder.parent / "limited" / "checkpoints")
    report["shared"] = shared_file(ranks, lease, folder.parent / "shared" / "checkpoints")
    report["background"] = background_save(ranks, lease, folder / "checkpoints")
    report |= choose(ranks, lease, folder / "checkpoints")
    return report


def choose(ranks: Ranks, lease: Lease | None, checkpoints: Path) -> dict[str, Any]:
    """Report what is chosen when rank 1 does not see what rank 0 sees, and when each share is damaged once.

    Rank 0 reads the first share, rank 1 the second and state.json: both must get the result of both.
    """
    report: dict[str, Any] = {}
    try:
        seen = checkpoints if ranks.world.is_first else checkpoints.with_name("elsewhere")
        report["unseen"] = str(load.newest_valid(seen, ranks, lease))
    except OSError as error:
        report["unseen"] = str(error)
    if ranks.world.is_first:
        for step, share in ((12, 0), (8, 1)):
            path = checkpoints / f"step_{step:09d}" / f"tensors_0000{share}_of_00002.safetensors"
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    report["undamaged"] = str(load.newest_valid(checkpoints, ranks, lease))
    return report


def over_limit(ranks: Ranks, lease: Lease | None, checkpoints: Path) -> dict[str, Any]:
    """Report a third checkpoint, of which two are kept: rank 1's first write reaches its user's limit."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    model, optimizer = trained(seed=5)
    saver = Saver(checkpoints, ranks, lease, options.Checkpoint(keep_last=2, keep_best=False))
    report: dict[str, Any] = {}
    for step in (4, 8, 12):
        tensors = checkpoint_save.local_state_dict(model, optimizer, ranks)
        with ExitStack() as stack:
            if ranks.world.rank == 1 and step == 12:
                outcomes = [limit_reached(), mock.DEFAULT]
                stack.enter_context(mock.patch.object(checkpoint_save, "_write", side_effect=outcomes,
                                                      wraps=checkpoint_save._write))  # fmt: skip
            saved = saver.begin(State(step, 400, 40, 2, {}), tensors) or saver.finish(lambda: None)
        assert saved is not None
        report[f"problem of {step}"] = saved.problem
    report["names"] = sorted(path.name for path in checkpoints.iterdir())
    return report


def limit_reached() -> OSError:
    return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def shared_file(ranks: Ranks, lease: Lease | None, checkpoints: Path) -> dict[str, Any]:
    """Report checkpoints of one file, into which both ranks write; the first time rank 1 may not."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    model, optimizer = trained(seed=4)
    saver = Saver(checkpoints, ranks, lease, options.Checkpoint(files=1))
    before = content(model, optimizer, ranks)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    report: dict[str, Any] = {}
    for step in (4, 8):
        if ranks.world.rank == 1 and step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        saver.begin(State(step, 400, 40, 2, {}), checkpoint_save.local_state_dict(model, optimizer, ranks))
        saved = saver.finish(lambda: None)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert saved is not None
        report[f"problem of {step}"] = saved.problem
        report[f"names after {step}"] = sorted(path.name for path in checkpoints.iterdir())
    other, other_optimizer = trained(seed=2, steps=1)
    chosen = load.newest_valid(checkpoints, ranks, lease)
    assert chosen is not None
    load.load(chosen, other, other_optimizer, ranks)
    report["same"] = content(other, other_optimizer, ranks) == before
    return report


def background_save(ranks: Ranks, lease: Lease | None, checkpoints: Path) -> dict[str, Any]:
    """Report a save in the background: the weights change at once, and rank 1's share is written late."""
    model, optimizer = trained(seed=3)
    saver = Saver(checkpoints, ranks, lease, options.Checkpoint())
    saver.begin(State(12, 1200, 120, ranks.world.size, {}), checkpoint_save.local_state_dict(model, optimizer, ranks))
    before = content(model, optimizer, ranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    under_way = saver._save
    assert under_way is not None
    work = under_way.work
    work._thread.join()
    if ranks.world.rank == 1:  # its share is not ready for three more step boundaries
        under_way.work = slow_work = Work(partial(_wait_for, checkpoints / "go", work.result), "saver")
    outcomes = [saver.poll() for _ in range(3)]
    report: dict[str, Any] = {"waits_for_all": outcomes == [None] * 3 and saver.busy and under_way.stage == "write"}
    report["unpublished"] = not (checkpoints / "step_000000012").exists()
    (checkpoints / "go").touch()
    if ranks.world.rank == 1:
        slow_work._thread.join()
    polls = [saver.poll()]
    report["second_stage"] = polls[0] is None and under_way.stage == "commit"
    saved = saver.finish(lambda: None)
    assert saved is not None
    report["problem"], report["step"], report["idle"] = (
        saved.problem,
        saved.step,
        not saver.busy and saver.finish(print) is None,
    )
    found: dict[str, bytes] = {}
    for path in (checkpoints / "step_000000012").glob("*.safetensors"):
        found |= {name: tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    report["old_weights"] = all(found[name] == value for name, value in before.items())
    return report


def _wait_for(path: Path, work: Callable[[], Any]) -> Any:
    while not path.exists():
        time.sleep(0.001)
    return work()


def main(folder: Path, full: Path | None) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), folder, "gloo", 60.0)
    lease: Lease | None = None
    if here.is_first:
        run_folder.prepare(folder)
        lease = acquire(folder, "")
    (folder / f"rank_{here.rank}.json").write_text(json.dumps(measure(ranks, lease, folder, full)))
    if lease:
        lease.release()
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
