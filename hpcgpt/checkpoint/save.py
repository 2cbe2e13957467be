"""Saves checkpoints during training: the state is copied at a step boundary, and written while the next steps run.

A save has two stages. First a thread of each rank writes the rank's share of the tensors. Once all have finished, which
the ranks find out together at a step boundary, a thread of rank 0 writes state and manifest, renames the folder to its
final name, and removes old checkpoints (``hpcgpt.checkpoint.pruner``).

One save is under way at a time: the next one waits for its end.

Files are flushed to the disk, then their folder; then it is renamed, and the folder above is flushed. Ranks share the
outcome of each stage before the next one, so a full disk on one of them costs all of them this checkpoint, and no rank
waits for one that has exited.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
from hpcgpt.distributed.sharded_tensor import is_sharded, rows_to_save
from hpcgpt.distributed.world import Ranks
from hpcgpt.optim.optimizer import state_keys
from hpcgpt.storage import atomic
from hpcgpt.storage.lease import Lease

POLL_S = 0.005
LONGEST_S = 3600.0  # after that the disk is taken to hang, and the watchdog may end the rank
SPARE_BYTES = 1 << 20  # state, manifest, headers


@dataclass(frozen=True)
class Saved:
    """The outcome of a save. `problem`: why it failed, the same on every rank; '' if it did not.

    `seconds` is the time from the copy until the checkpoint was visible, `stall_s` how long training waited for it,
    `bytes` its size.
    """

    step: int
    problem: str
    seconds: float
    stall_s: float
    bytes: int


def local_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint that this rank has, by name. They are not copied.

    If ranks have different rows of a tensor, its name is ``name[first:after]``. All others are the same on every rank,
    except ``rng/``.
    """
    tensors: dict[str, Tensor] = {}

    def add(name: str, tensor: Tensor) -> None:
        rows = rows_to_save(tensor)
        if not is_sharded(tensor):
            tensors[name] = tensor
        elif rows.start < rows.stop:
            tensors[f"{name}[{rows.start}:{rows.stop}]"] = rows.local

    has_state = any(optimizer.state.values())
    keys = state_keys(optimizer)
    for name, parameter in model.named_parameters():
        add(f"model/{name}", parameter.detach())
        # An optimizer has no state before its first step. If a run saves before, because it has skipped every step
        # (train.on_nonfinite), the initial state is written: a checkpoint is always complete.
        state = optimizer.state[parameter] if has_state else dict.fromkeys(keys.get(parameter, ()))
        for key, value in state.items():
            add(f"optim/{name}/{key}", _initial_state(key, parameter) if value is None else value)
    rank = ranks.world.rank
    tensors[f"rng/{rank}/cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        tensors[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return tensors


def _initial_state(key: str, parameter: nn.Parameter) -> Tensor:
    return torch.tensor(0.0, device=parameter.device) if key == "step" else torch.zeros_like(parameter.detach())


class Saver:
    """Saves the checkpoints of one attempt. Every rank has one, and calls it at the same points.

    All methods but `busy` are collectives. `lease` is None except on rank 0.
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
        """Prepare to save, without a save under way.

        A thread of rank 0 calls `before_commit`, which flushes what must be on the disk before the checkpoint becomes
        visible, and `committed` as soon as it is. `regular`: see retention.prune.
        """
        self._checkpoints, self._ranks, self._lease = checkpoints, ranks, lease
        self._before_commit, self._committed = before_commit, committed
        self.pruner = Pruner(checkpoints, lease, keep, regular) if lease else None  # rank 0's
        # Remove old checkpoints after each save. Once this is False, a removal under way is not waited for, either:
        # comparing the checksums of a large checkpoint may take longer than a job has that must stop.
        self.prune_old = True
        self._copies: dict[str, Tensor] = {}  # reused: allocating memory takes longer than copying
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Return whether a save is under way: the same on every rank."""
        return self._save is not None

    def begin(self, state: State, tensors: dict[str, Tensor]) -> Saved | None:
        """Copy `tensors`, from `local_state_dict`, and start to write them.

        Return the outcome if it has ended already: the checkpoint exists, or there is no room.
        """
        assert not self.busy
        began_at, problem = time.monotonic(), ""
        size = self._size(tensors)
        final = layout.path_of(self._checkpoints, state.step)
        try:
            temporary = run_on_rank0(self._ranks, lambda: self._make_folder(final, size))
        except OSError as error:
            temporary, problem = None, str(error)
        if temporary is None:
            seconds = time.monotonic() - began_at
            return Saved(state.step, problem, seconds, seconds, size)
        share = self._copy(share_of(tensors, self._ranks))
        path = Path(temporary) / layout.share_name(self._ranks.world.rank, self._ranks.world.size)
        work = _Work(lambda: (path.name, safetensors_writer.write(path, share)))
        self._save = _Save(state, size, path.parent, final, began_at, work, stall_s=time.monotonic() - began_at)
        return None

    def poll(self) -> Saved | None:
        """Advance the save at a step boundary, while `busy`; return the outcome if it has ended."""
        assert self._save is not None
        started_at = time.monotonic()
        problem = self._advance(self._save)
        self._save.stall_s += time.monotonic() - started_at
        return None if problem is None else self._end(self._save, problem)

    def finish(self, alive: Callable[[], None]) -> Saved | None:
        """Wait for the save that is under way, if any; return its outcome. Meanwhile call `alive`, up to LONGEST_S."""
        save, started_at = self._save, time.monotonic()
        while save is not None:
            if time.monotonic() - save.began_at < LONGEST_S:
                alive()
            problem = self._advance(save)
            if problem is not None:
                save.stall_s += time.monotonic() - started_at
                return self._end(save, problem)
            time.sleep(POLL_S)
        return None

    def _advance(self, save: _Save) -> str | None:
        """Begin the next stage if all ranks are ready; return '' or the problem if the save has ended, else None."""
        if not self._all_ready(save):
            return None
        try:
            if save.committing:
                run_on_rank0(self._ranks, save.work.result)
                return ""
            files = dict(gather_from_all(self._ranks, save.work.result))
        except OSError as error:
            # The error was shared: no rank writes any more, and the incomplete folder is useless.
            if self._lease is not None:
                shutil.rmtree(save.temporary, ignore_errors=True)
            return str(error)
        save.committing = True
        save.work = _Work((lambda: self._commit(save, files)) if self._ranks.world.is_first else lambda: None)
        return None

    def _all_ready(self, save: _Save) -> bool:
        """Return whether no rank has to wait for its thread any longer."""
        only_pruning = save.visible.is_set() and not self.prune_old
        ready = torch.tensor([int(save.work.ready or only_pruning)])
        if self._ranks.cpu_group is not None:
            dist.all_reduce(ready, dist.ReduceOp.MIN, group=self._ranks.cpu_group)
        return bool(ready)

    def _end(self, save: _Save, problem: str) -> Saved:
        self._save = None
        return save.outcome(problem)

    def _size(self, tensors: dict[str, Tensor]) -> int:
        """Return the bytes of a checkpoint of `tensors`, those that only other ranks have included."""
        common = sum(tensor.nbytes for name, tensor in tensors.items() if not _is_own(name))
        own = sum(tensor.nbytes for name, tensor in tensors.items() if _is_own(name))
        return common + sum(gather_from_all(self._ranks, lambda: own))

    def _make_folder(self, final: Path, size: int) -> str | None:
        """Make the temporary folder, and room if necessary; return its path, None if the checkpoint exists already."""
        assert self._lease is not None
        assert self.pruner is not None
        self._lease.check()  # an older generation must not write, nor take a newer one's checkpoint for its own
        if final.exists():
            return None
        self.pruner.wait()
        temporary = layout.temporary_of(final, self._lease.number)
        needed = size + SPARE_BYTES
        try:
            if self._free() < needed:
                self.pruner.make_room(final.name)
            if self._free() < needed:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.1f} MB needed")
            temporary.mkdir()
        except OSError as error:
            raise atomic.with_path_and_free_space(error, temporary) from error
        return str(temporary)

    def _free(self) -> int:
        status = os.statvfs(self._checkpoints)
        return status.f_bavail * status.f_frsize

    def _copy(self, share: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to host memory."""
        for name, tensor in share.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
        if self._ranks.device.type == "cuda":
            torch.cuda.current_stream(self._ranks.device).synchronize()
        return {name: self._copies[name] for name in share}

    def _commit(self, save: _Save, files: dict[str, Any]) -> None:
        """Write state and manifest, make the checkpoint visible, and remove old ones."""
        lease, temporary = self._lease, save.temporary
        assert lease is not None
        assert self.pruner is not None
        self._before_commit()
        content = layout.state_bytes(save.state)
        atomic.write(temporary / "state.json", content)
        files["state.json"] = safetensors_writer.fingerprint(content)
        # The last file: `atomic.write` also flushes the folder.
        atomic.write(temporary / "manifest.json", layout.manifest_bytes(files, lease.number))
        lease.check()
        try:
            temporary.rename(save.final)
        except OSError as error:
            raise atomic.with_path_and_free_space(error, save.final) from error
        atomic.sync_folder(self._checkpoints)
        self.pruner.saved(save.final)
        self._committed(save.outcome())
        save.visible.set()
        if self.prune_old:
            self.pruner.prune_after_save()


@dataclass
class _Save:
    """The save that is under way. `work` is its first stage, or its second if `committing`."""

    state: State
    bytes: int
    temporary: Path
    final: Path
    began_at: float
    work: _Work
    stall_s: float
    committing: bool = False
    # Set once the checkpoint is visible; old ones may still be being removed.
    visible: threading.Event = field(default_factory=threading.Event)

    def outcome(self, problem: str = "") -> Saved:
        return Saved(self.state.step, problem, time.monotonic() - self.began_at, self.stall_s, self.bytes)


class _Work:
    """Runs a function in a thread, and keeps its result or error."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._result = work, None
        self._error: BaseException | None = None
        # A daemon, so that the process can exit while a disk hangs.
        self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # `result` raises it
            self._error = error

    @property
    def ready(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


def share_of(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the tensors that this rank writes: those that only it has, and its share of those that all have.

    These are divided by size: the largest first, each to the rank with the fewest bytes of them so far.
    """
    sizes = [0] * ranks.world.size
    share = {name: tensor for name, tensor in tensors.items() if _is_own(name)}
    common = [(t.numel() * t.element_size(), name) for name, t in tensors.items() if name not in share]
    for size, name in sorted(common, key=lambda row: (-row[0], row[1])):
        rank = sizes.index(min(sizes))
        sizes[rank] += size
        if rank == ranks.world.rank:
            share[name] = tensors[name]
    return share


def _is_own(name: str) -> bool:
    """Return whether only one rank has this tensor."""
    return name.startswith("rng/") or name.endswith("]")
