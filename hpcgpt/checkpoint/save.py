"""Saving behind training: the state is copied at a step boundary, and written while the next steps run.

A save has two stages. First each rank writes its share of the tensors, in a thread of its own; when all ranks have,
which they find out together at a step boundary, rank 0 writes state and manifest, gives the folder its name and
removes old checkpoints (``hpcgpt.checkpoint.pruner``), in a thread too.

One save is under way at a time: to begin the next waits for it.

Files are flushed to the disk, then the folder; then it gets its name, and the folder above is flushed. Ranks
share the outcome of each stage before the next one, so a full disk on one of them costs all of them this
checkpoint, and no rank waits for one that has left.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.config import options
from hpcgpt.distributed.collectives import gather_from_all, run_on_rank0
from hpcgpt.distributed.sharded_tensor import is_sharded, local_rows
from hpcgpt.distributed.world import Ranks
from hpcgpt.optim.optimizer import state_keys
from hpcgpt.storage import atomic
from hpcgpt.storage.lease import Lease

POLL_S = 0.005
LONGEST_S = 3600.0  # a save that takes longer waits for a disk that does not answer: the watchdog may end the rank
SPARE_BYTES = 1 << 20  # state, manifest, headers


@dataclass(frozen=True)
class Saved:
    """How a save ended: '' or the problem, the same on every rank.

    `seconds` is the time from the copy until the checkpoint was there, `stall_s` the time that training stood still
    for it, `bytes` its size.
    """

    step: int
    problem: str
    seconds: float
    stall_s: float
    bytes: int


def local_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """All tensors of a checkpoint that this rank has, by name. They are the live ones: not copied.

    Where ranks have shares of the rows of a tensor, under ``name[first:after]``; else the same on every rank, but for
    ``rng/``.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        own = local_rows(tensor)
        if not is_sharded(tensor):
            found[name] = tensor
        elif own.start < own.stop:
            found[f"{name}[{own.start}:{own.stop}]"] = own.local

    begun = any(optimizer.state.values())
    keys = state_keys(optimizer)
    for name, parameter in model.named_parameters():
        add(f"model/{name}", parameter.detach())
        # Before its first step an optimizer has no state. A run may save then, where every step so far was skipped
        # (train.on_nonfinite): so what it would begin with is written, and a checkpoint is always complete.
        state = optimizer.state[parameter] if begun else dict.fromkeys(keys.get(parameter, ()))
        for key, value in state.items():
            add(f"optim/{name}/{key}", _first_state(key, parameter) if value is None else value)
    rank = ranks.world.rank
    found[f"rng/{rank}/cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        found[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return found


def _first_state(key: str, parameter: nn.Parameter) -> Tensor:
    return torch.tensor(0.0, device=parameter.device) if key == "step" else torch.zeros_like(parameter.detach())


class Saver:
    """Saves the checkpoints of one attempt. Every rank has one, and calls it at the same places.

    All but `busy` are collectives.
    """

    def __init__(
        self,
        checkpoints: Path,
        ranks: Ranks,
        lease: Lease | None,
        keep: options.Checkpoint,
        before_commit: Callable[[], None] = lambda: None,
        committed: Callable[[Saved], None] = lambda _: None,
        regular: int = 0,
    ) -> None:
        """`lease` is rank 0's generation, None on the others.

        Rank 0 calls both in its thread: `before_commit` puts on the disk what has to be there before the checkpoint
        is; `committed` tells of it as soon as it is there, with what it has cost until then. `regular`: see
        retention.prune.
        """
        self._checkpoints, self._ranks, self._lease = checkpoints, ranks, lease
        self._before_commit, self._committed = before_commit, committed
        self.pruner = Pruner(checkpoints, lease, keep, regular) if lease else None  # rank 0's
        # Remove old checkpoints behind each new one. Once it is False nobody waits for a removal under way either: to
        # read back a large checkpoint takes longer than a job has that is told to leave.
        self.prune_old = True
        self._there = threading.Event()  # the checkpoint of this save is; old ones may still be removed
        self._copies: dict[str, Tensor] = {}  # kept: fresh memory costs more than the copying
        self._work: _Work | None = None
        self._committing = False

    @property
    def busy(self) -> bool:
        """Is a save under way? The same on every rank."""
        return self._work is not None

    def begin(self, state: State, tensors: dict[str, Tensor]) -> Saved | None:
        """Copy `tensors`, as `local_state_dict` gives them, and start to write them.

        Returns the outcome at once if there is nothing to wait for: it is there already, or there is no room.
        """
        assert not self.busy
        self._state, self._began_at, self._stall_s = state, time.monotonic(), 0.0
        common = sum(tensor.nbytes for name, tensor in tensors.items() if not _is_own(name))
        own = sum(tensor.nbytes for name, tensor in tensors.items() if _is_own(name))
        self._bytes = common + sum(gather_from_all(self._ranks, lambda: own))
        self._final = layout.path_of(self._checkpoints, state.step)
        try:
            temporary = run_on_rank0(self._ranks, self._make_folder)
        except OSError as error:
            return self._ended(str(error))
        if temporary is None:
            return self._ended("")
        self._temporary = Path(temporary)
        share = self._copied(_share(tensors, self._ranks))
        path = self._temporary / layout.share_name(self._ranks.world.rank, self._ranks.world.size)
        self._committing = False
        self._there.clear()
        self._work = _Work(lambda: (path.name, safetensors_writer.write(path, share)))
        self._stall_s += time.monotonic() - self._began_at
        return None

    def poll(self) -> Saved | None:
        """At a step boundary while `busy`: go on if all ranks are ready to; the outcome when the save has ended."""
        started_at = time.monotonic()
        problem = self._advance()
        self._stall_s += time.monotonic() - started_at
        return None if problem is None else self._ended(problem)

    def finish(self, alive: Callable[[], None]) -> Saved | None:
        """Wait for the save that is under way, if one is; `alive` is called while it lasts, up to LONGEST_S."""
        started_at = time.monotonic()
        while self.busy:
            if time.monotonic() - self._began_at < LONGEST_S:
                alive()
            problem = self._advance()
            if problem is not None:
                self._stall_s += time.monotonic() - started_at
                return self._ended(problem)
            time.sleep(POLL_S)
        return None

    def _advance(self) -> str | None:
        """One look: None while it lasts, then '' or the problem."""
        assert self._work is not None
        if not self._all_ready(self._work):
            return None
        work = self._work
        try:
            if self._committing:
                run_on_rank0(self._ranks, work.result)
                self._work = None
                return ""
            files = dict(gather_from_all(self._ranks, work.result))
        except OSError as error:
            # Nobody writes any more: the error was shared. What is half written is ours, and useless.
            if self._lease is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)
            self._work = None
            return str(error)
        self._committing = True
        self._work = _Work((lambda: self._commit(files)) if self._ranks.world.is_first else lambda: None)
        return None

    def _all_ready(self, work: _Work) -> bool:
        left_alone = self._there.is_set() and not self.prune_old
        ready = torch.tensor([int(work.ready or left_alone)])
        if self._ranks.cpu_group is not None:
            dist.all_reduce(ready, dist.ReduceOp.MIN, group=self._ranks.cpu_group)
        return bool(ready)

    def _ended(self, problem: str) -> Saved:
        if not self._stall_s:  # it ended where it began
            self._stall_s = time.monotonic() - self._began_at
        return self._so_far(problem)

    def _so_far(self, problem: str = "") -> Saved:
        return Saved(self._state.step, problem, time.monotonic() - self._began_at, self._stall_s, self._bytes)

    def _make_folder(self) -> str | None:
        assert self._lease is not None
        assert self.pruner is not None
        self._lease.check()  # an orphan must neither begin anything nor take its successor's checkpoint for its own
        if self._final.exists():
            return None
        self.pruner.wait()
        temporary = layout.temporary_of(self._final, self._lease.number)
        needed = self._bytes + SPARE_BYTES
        try:
            if self._free() < needed:
                self.pruner.make_room(self._final.name)
            if self._free() < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.1f} MB needed")
            temporary.mkdir()
        except OSError as error:
            raise atomic.with_path_and_free_space(error, temporary) from error
        return str(temporary)

    def _free(self) -> int:
        status = os.statvfs(self._checkpoints)
        return status.f_bavail * status.f_frsize

    def _copied(self, share: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in share.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream(self._ranks.device).synchronize()
        return {name: self._copies[name] for name in share}

    def _commit(self, files: dict[str, Any]) -> None:
        lease, temporary = self._lease, self._temporary
        assert lease is not None
        assert self.pruner is not None
        self._before_commit()
        content = layout.state_bytes(self._state)
        atomic.write(temporary / "state.json", content)
        files["state.json"] = safetensors_writer.fingerprint(content)
        atomic.write(temporary / "manifest.json", layout.manifest_bytes(files, lease.number))
        lease.check()
        try:
            temporary.rename(self._final)
        except OSError as error:
            raise atomic.with_path_and_free_space(error, self._final) from error
        atomic.sync_folder(self._checkpoints)
        self.pruner.saved(self._final)
        self._committed(self._so_far())
        self._there.set()
        if self.prune_old:
            self.pruner.prune_after_save()


class _Work:
    """Something done in a thread, whose result or error waits to be taken."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._result = work, None
        self._error: BaseException | None = None
        # A daemon: a process that has to leave does not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # it is raised where the result is taken
            self._error = error

    @property
    def ready(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def _share(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors that this rank writes: its own, and of those that all have the largest first, each to the rank with
    the least of them so far.
    """
    sizes = [0] * ranks.world.size
    mine = {name: tensor for name, tensor in tensors.items() if _is_own(name)}
    common = [(t.numel() * t.element_size(), name) for name, t in tensors.items() if name not in mine]
    for size, name in sorted(common, key=lambda row: (-row[0], row[1])):
        rank = sizes.index(min(sizes))
        sizes[rank] += size
        if rank == ranks.world.rank:
            mine[name] = tensors[name]
    return mine


def _is_own(name: str) -> bool:
    """Has no other rank this tensor?"""
    return name.startswith("rng/") or name.endswith("]")
