"""Many ranks as threads of one process, with real collectives, real sharded tensors and real files.

Sixty-four processes would not fit on a small machine. The ranks are connected by the process group that torch tests its
own sharding with; everything else is the program's own code. Used by test_many_ranks and benchmarks/loading.py, in
processes of their own, because the process group replaces a global variable of torch.
"""

from __future__ import annotations

import pickle
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed import multi_threaded_pg as _multi_threaded_pg

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import Saver, local_state_dict
from hpcgpt.config.options import Checkpoint, Model, Optim
from hpcgpt.distributed import world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.storage.lease import Lease

T = TypeVar("T")
SMALL = Model(
    n_layer=2, n_head=2, n_embd=40, block_size=16, vocab_size=331, tied=False
)  # no number of ranks divides all rows
LONGEST_S = 120.0  # that a rank waits for another one
_GENERATOR = threading.Lock()  # there is one for all threads
_IN_THREADS: Any = _multi_threaded_pg  # neither has types
_C10D: Any = torch._C._distributed_c10d


def on_threads(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """Run `work` on that many ranks; return the results by rank, or raise the error of the first that failed."""
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size
    _C10D._set_thread_isolation_mode(True)
    _IN_THREADS._install_threaded_pg()
    store, boxes = dist.HashStore(), dict[tuple[int, int], queue.SimpleQueue[bytes]]()

    def box(sender: int, receiver: int) -> queue.SimpleQueue[bytes]:
        return boxes.setdefault((sender, receiver), queue.SimpleQueue())

    # What this process group lacks, and hpcgpt.distributed.tree uses.
    def send(objects: list[Any], receiver: int, _group: dist.ProcessGroup) -> None:
        box(dist.get_rank(), receiver).put(pickle.dumps(objects))

    def receive(objects: list[Any], sender: int, _group: dist.ProcessGroup) -> None:
        objects[:] = pickle.loads(box(sender, dist.get_rank()).get(timeout=LONGEST_S))

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            here = world.World(rank, rank, size, size, "alone", "threads")
            results[rank] = work(Ranks(here, torch.device("cpu"), dist.group.WORLD))
        except BaseException as error:
            errors[rank] = error
            _IN_THREADS.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    real = dist.send_object_list, dist.recv_object_list
    dist.send_object_list, dist.recv_object_list = send, receive  # type: ignore[assignment]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        dist.send_object_list, dist.recv_object_list = real
        _IN_THREADS.ProcessLocalGroup.reset()
        _IN_THREADS._uninstall_threaded_pg()
        _C10D._set_thread_isolation_mode(False)
    for error in errors:
        if error is not None:
            raise error
    return results


def made(shape: Model, ranks: Ranks, sharded: bool, seed: int) -> tuple[GPT, torch.optim.Optimizer]:
    """Return a model and its optimizer, with values that depend on `seed` only; `sharded`: each rank has its rows."""
    with _GENERATOR:
        model = GPT(shape, seed)
        optimizer = make_optimizer(model, Optim())
        generator = torch.Generator().manual_seed(seed)
        whole = {name: [parameter.detach().clone(), *(torch.rand(parameter.shape, generator=generator) for _ in "12")]
                 for name, parameter in model.named_parameters()}  # fmt: skip
    mesh = DeviceMesh("cpu", list(range(ranks.world.size))) if sharded else None
    if mesh:
        for name, parameter in list(model.named_parameters()):
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(_rows(parameter.detach(), mesh, ranks)))
        optimizer = make_optimizer(model, Optim())
    for name, parameter in model.named_parameters():
        _, *moments = whole[name]
        exp_avg, exp_avg_sq = [_rows(one, mesh, ranks) if mesh else one for one in moments]
        optimizer.state[parameter] = {"step": torch.tensor(float(seed)), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    return model, optimizer


def _rows(tensor: Tensor, mesh: DeviceMesh, ranks: Ranks) -> DTensor:
    most = -(-len(tensor) // ranks.world.size)
    local = tensor[ranks.world.rank * most : (ranks.world.rank + 1) * most].clone()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def content(model: GPT, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, bytes]:
    """Return what this rank has of the run, without the random generator, which the threads share."""
    found = local_state_dict(model, optimizer, ranks)
    return {name: tensor.numpy().tobytes() for name, tensor in found.items() if not name.startswith("rng/")}


def save(folder: Path, ranks: Ranks, lease: Lease | None, sharded: bool, files: int, shape: Model = SMALL) -> Path:
    """Save a checkpoint of step 4; return its path."""
    model, optimizer = made(shape, ranks, sharded, seed=4)
    saver = Saver(folder / "checkpoints", ranks, lease if ranks.world.is_first else None, Checkpoint(files=files))
    state = State(4, 400, 40, ranks.world.size, {})
    saved = saver.begin(state, local_state_dict(model, optimizer, ranks)) or saver.finish(lambda: None)
    assert saved is not None
    assert not saved.problem, saved.problem
    return layout.path_of(folder / "checkpoints", 4)


@dataclass
class Reads:
    """What a thread has read: files opened, and bytes."""

    opens: int = 0
    bytes: int = 0


class Counter:
    """Counts what each thread reads below a folder, from `start` on. Python opens all files."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._local = str(folder), threading.local()
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self._folder):
            self._local.opens = getattr(self._local, "opens", 0) + 1

    def start(self) -> None:
        self._local.opens, self._local.before = 0, _bytes_read()

    def reads(self) -> Reads:
        return Reads(self._local.opens, _bytes_read() - self._local.before)


def _bytes_read() -> int:
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])
