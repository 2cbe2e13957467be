"""Saves checkpoints during training: the state is copied at a step boundary, and written while the next steps run.

A save has four stages, each in threads. Each rank writes its share of the tensors. Rank 0 writes state and manifest,
and renames the folder to its final name. Each rank reads back a part, and compares checksums. Rank 0 removes old
checkpoints (``hpcgpt.checkpoint.pruner``). A stage begins once all ranks have finished the one before, which they find
out together at a step boundary. They need no collective to find out: the sums of `Saver.votes` travel with the loss of
the step. Only the beginning of a save and the end of each stage have collectives. If one of the first two stages finds
no room, rank 0 removes the checkpoints that this one replaces, and the first begins once more.

One save is under way at a time: the next one waits for its end.

Files are flushed to the disk, then their folder; then it is renamed, and the folder above is flushed. Ranks share the
outcome of each stage before the next one, so an error on one of them costs all of them this checkpoint, and no rank
waits for one that has exited.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.parts import PADDING, Place, joined, own_parts, padded, place_of
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.checkpoint.retention import Unread
from hpcgpt.config import options
from hpcgpt.distributed.collectives import distinct_on_all, gather_from_all, run_on_rank0
from hpcgpt.distributed.sharded_tensor import is_sharded, rows_to_save
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.optim.optimizer import state_keys
from hpcgpt.storage import atomic
from hpcgpt.storage.background import Work
from hpcgpt.storage.lease import Lease

POLL_S = 0.005
LONGEST_S = 3600.0  # after that the disk is taken to hang, and the watchdog may end the rank
Stage = Literal["write", "commit", "read back", "prune"]
SPARE_BYTES = 1 << 20  # state, manifest, headers


@dataclass(frozen=True)
class Saved:
    """The outcome of a save. `problem`: why it failed, the same on every rank; '' if it did not. `existed`: nothing was
    written, as the checkpoint was there already; its times say nothing about saving.

    `seconds` is the time from the copy until the checkpoint was visible, `stall_s` how long training waited for it,
    `bytes` its size. `may_pass`: another try may succeed, since the problem is not lack of room, for which the save has
    been tried again already.
    """

    step: int
    problem: str
    seconds: float
    stall_s: float
    bytes: int
    may_pass: bool = False
    existed: bool = False


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

    All methods but `busy` and `votes` are collectives. `lease` is None except on rank 0.
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
        self._files = keep.files
        self._shares_files = keep.files < ranks.world.size  # else each rank has its own
        self._copies: dict[str, Tensor] = {}  # reused: allocating memory takes longer than copying
        self._save: _Save | None = None
        self._stages = 0  # begun so far, of all saves: the same on every rank

    @property
    def busy(self) -> bool:
        """Return whether a save is under way: the same on every rank."""
        return self._save is not None

    @property
    def votes(self) -> list[float]:
        """Return this rank's votes on whether the current stage is complete: all must have voted for it.

        Stages have the two places in turn: on a GPU votes are counted one step after they were given, and those on the
        stage before must not count as votes on this one.
        """
        done = [0.0, 0.0]
        done[self._stages % 2] = float(self._save is not None and self._save.work.ready)
        return done

    def begin(self, state: State, tensors: dict[str, Tensor]) -> Saved | None:
        """Copy `tensors`, from `local_state_dict`, and start to write them.

        Return the outcome if it has ended already: the checkpoint exists, or there is no room.
        """
        assert not self.busy
        began_at, problem, may_pass = time.monotonic(), "", False
        share = share_of(tensors, self._ranks)
        if self._shares_files:
            room = padded(byte_count(share)) - byte_count(share)
            share[f"{PADDING}{self._ranks.world.rank}"] = torch.zeros(room, dtype=torch.uint8)
        sizes = gather_from_all(self._ranks, lambda: _sizes(share, self._shares_files))
        size = sum(header + data for header, data in sizes)
        final = layout.path_of(self._checkpoints, state.step)
        try:
            temporary = run_on_rank0(self._ranks, lambda: self._make_folder(final, size))
        except OSError as error:
            temporary, problem, may_pass = None, str(error), error.errno not in atomic.NO_ROOM
        if temporary is None:
            seconds = time.monotonic() - began_at
            return Saved(state.step, problem, seconds, seconds, size, may_pass, existed=not problem)
        copies, folder = _copied(share, self._copies, self._ranks.device), Path(temporary)
        place = place_of(sizes, self._ranks.world.rank, self._files)
        self._save = _Save(
            state, size, folder, final, began_at, lambda: _write(folder, copies, place, self._shares_files)
        )
        self._begin_stage(self._save, "write", self._save.write)
        self._save.stall_s = time.monotonic() - began_at
        return None

    def poll(self, votes: Sequence[float] | None = None) -> Saved | None:
        """Advance the save at a step boundary, while `busy`; return the outcome if it has ended.

        `votes` are the sums of ``votes`` over the ranks; None: the ranks are asked now.
        """
        save, started_at = self._save, time.monotonic()
        assert save is not None
        problem = self._advance(save) if self._all_ready(save, votes) else None
        save.stall_s += time.monotonic() - started_at
        return None if problem is None else self._end(save, problem)

    def finish(self, alive: Callable[[], None], followed: bool = False) -> Saved | None:
        """Wait for the save that is under way, if any; return its outcome. Meanwhile call `alive`, up to LONGEST_S.

        `followed`: another one follows at once, so if this one finds no room it fails, and leaves making room to that.
        """
        save, started_at = self._save, time.monotonic()
        if save is not None:
            save.may_repeat &= not followed
        while save is not None:
            if time.monotonic() - save.began_at < LONGEST_S:
                alive()
            problem = self._advance(save) if self._all_ready(save) else None
            if problem is not None:
                save.stall_s += time.monotonic() - started_at
                return self._end(save, problem)
            time.sleep(POLL_S)
        return None

    def _advance(self, save: _Save) -> str | None:
        """End the stage, which all ranks have completed; return '' or the problem if the save has ended, else None."""
        if save.visible and not self.prune_old:
            return ""
        try:
            if save.stage == "write":
                files = joined(gather_from_all(self._ranks, save.work.result))
                self._begin_stage(save, "commit", self._on_first(lambda: self._commit(save, files)))
            elif save.stage == "commit":
                unread = run_on_rank0(self._ranks, save.work.result)
                save.visible_s = time.monotonic() - save.began_at
                if not self.prune_old:
                    return ""
                self._begin_stage(save, "read back", lambda: _read_back(self._checkpoints, unread, self._ranks.world))
            elif save.stage == "read back":
                whole = [set(names) for names in gather_from_all(self._ranks, save.work.result)]
                self._begin_stage(save, "prune", self._on_first(lambda: self._prune(set.intersection(*whole))))
            else:
                run_on_rank0(self._ranks, save.work.result)
                return ""
        except OSError as error:
            # The error was shared: no rank writes any more, and the incomplete folder is useless.
            if self.pruner is not None:
                shutil.rmtree(save.temporary, ignore_errors=True)
                self.pruner.is_tight |= error.errno in atomic.NO_ROOM
            save.may_pass = error.errno not in atomic.NO_ROOM and not save.visible
            if error.errno not in atomic.NO_ROOM or save.visible or not _has_made_room(save, self.pruner, self._ranks):
                return str(error)
            self._begin_stage(save, "write", save.write)
        return None

    def _on_first(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work if self._ranks.world.is_first else lambda: None

    def _begin_stage(self, save: _Save, stage: Stage, work: Callable[[], Any]) -> None:
        save.stage, save.work = stage, Work(work, "saver")
        self._stages += 1

    def _all_ready(self, save: _Save, votes: Sequence[float] | None = None) -> bool:
        """Return whether no rank has to wait for its thread any longer: by the sums of `votes`, or a collective."""
        if save.visible and not self.prune_old:
            return True
        if votes is not None:
            return votes[self._stages % 2] == self._ranks.world.size
        return all(distinct_on_all(self._ranks, lambda: save.work.ready))

    def _end(self, save: _Save, problem: str) -> Saved:
        self._save = None
        return save.outcome(problem)

    def _make_folder(self, final: Path, size: int) -> str | None:
        """Make the temporary folder, and room if necessary; return its path, None if the checkpoint exists already."""
        assert self._lease is not None
        assert self.pruner is not None
        self._lease.check()  # an older generation must not write, nor take a newer one's checkpoint for its own
        if final.exists():
            atomic.sync_folder(self._checkpoints)  # which may be what has failed, after it got its name
            return None
        self.pruner.wait()
        temporary = layout.temporary_of(final, self._lease.number)
        shutil.rmtree(temporary, ignore_errors=True)  # of a failed save that could not remove it
        self.pruner.make_folder(temporary, final.name, size + SPARE_BYTES)
        return str(temporary)

    def _commit(self, save: _Save, files: dict[str, Any]) -> list[Unread]:
        """Write state and manifest, and make the checkpoint visible; return what is to be read back."""
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
            temporary.rename(save.final)  # from here on readers find the checkpoint
        except OSError as error:
            raise atomic.with_path_and_free_space(error, save.final) from error
        atomic.sync_folder(self._checkpoints)
        self.pruner.saved(save.final)
        self._committed(save.outcome())
        return self.pruner.unread() if self.prune_old else []

    def _prune(self, whole: set[str]) -> None:
        assert self.pruner is not None
        self.pruner.prune_after_save(whole)


@dataclass
class _Save:
    """The save that is under way. `write` writes this rank's share; `work` is the present stage, once one has begun."""

    state: State
    bytes: int
    temporary: Path
    final: Path
    began_at: float
    write: Callable[[], tuple[Any, ...]]
    work: Work = field(init=False)
    stall_s: float = 0.0
    stage: Stage = "write"
    may_repeat: bool = True  # if it finds no room
    may_pass: bool = False  # the problem: see Saved
    visible_s: float | None = None  # None until all ranks know that the checkpoint is visible

    @property
    def visible(self) -> bool:
        """Return whether the checkpoint is on the disk, and only old ones are yet to be removed."""
        return self.stage in ("read back", "prune")

    def outcome(self, problem: str = "") -> Saved:
        seconds = time.monotonic() - self.began_at if self.visible_s is None else self.visible_s
        return Saved(self.state.step, problem, seconds, self.stall_s, self.bytes, bool(problem) and self.may_pass)


def _has_made_room(save: _Save, pruner: Pruner | None, ranks: Ranks) -> bool:
    """Return whether old checkpoints were removed for this save, after it had no room: once. A collective."""
    may_repeat, save.may_repeat = save.may_repeat, False
    with suppress(OSError):
        return may_repeat and run_on_rank0(ranks, lambda: _make_anew(save, pruner))
    return False


def _make_anew(save: _Save, pruner: Pruner | None) -> bool:
    assert pruner is not None
    return not save.final.exists() and pruner.remake(save.temporary, save.final.name)


def _copied(share: dict[str, Tensor], copies: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy tensors to host memory: into `copies`, by name, which gets those that it lacks."""
    for name, tensor in share.items():
        if name not in copies:
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor, non_blocking=tensor.is_cuda)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return {name: copies[name] for name in share}


def _sizes(share: dict[str, Tensor], shared: bool) -> tuple[int, int]:
    """Return the bytes of a rank's share of the header, 0 if its file has no others, and of its tensors."""
    return safetensors_writer.share_bytes(share) if shared else (0, byte_count(share))


def _read_back(checkpoints: Path, unread: list[Unread], world: World) -> list[str]:
    """Compare checksums of this rank's parts of checkpoints; return the names of those with no damage in them."""
    whole = []
    # Not what this host has written: it may still have that in memory.
    rank = (world.rank + world.size // 2) % world.size
    for name, parts in unread:
        with suppress(Exception):  # it decides only what may be removed: rank 0 checks it again
            if not layout.check_checksums(checkpoints / name, own_parts(parts, rank, world.size)):
                whole.append(name)
    return whole


def _write(folder: Path, share: dict[str, Tensor], place: Place, shared: bool) -> tuple[Any, ...]:
    """Write a rank's share; return the file's name, and ``bytes`` and ``xxh3`` of each part that was written."""
    path = folder / layout.share_name(place.number, place.files)
    if shared:
        return (path.name, *safetensors_writer.write_share(path, share, place))
    return path.name, safetensors_writer.write(path, share)


def byte_count(share: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in share.values())


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
