"""Resumes from a checkpoint: all ranks together choose the newest valid one, and each loads it.

Rank 0 checks which checkpoints there are, and their structure; the checksums are divided among the ranks. A damaged
checkpoint is set aside, and the one before it is used.

One that cannot be read (EIO, ESTALE; tried twice) may be whole, and the host at fault. So the attempt crashes, and the
requeue policy may choose other nodes. But a bad block must not end a run: once an attempt on another host could not
read it either, or two earlier ones on any host, it is set aside like a damaged one, with a warning, and the one before
it is used. Nothing of it is deleted: a person can give it back its name when the disk works again. It has to be
renamed, because the run will save this step once more, under the same name. Each failure is recorded as an event,
``unreadable``. It does not count for a checkpoint of the same step that was saved, or restored, after it.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hpcgpt.checkpoint import layout, stored
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.parts import PADDING, Part, own_parts, parts_of
from hpcgpt.checkpoint.stored import Piece, Reader, Stored
from hpcgpt.distributed.collectives import gather_from_all, run_on_rank0
from hpcgpt.distributed.sharded_tensor import is_sharded, local_rows
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import InputError, UserError
from hpcgpt.optim.optimizer import state_keys
from hpcgpt.output import streams
from hpcgpt.run import unreadable
from hpcgpt.run.unreadable import Unreadable
from hpcgpt.storage.lease import Lease

T = TypeVar("T")
RETRY_S = 0.5


def newest_valid(
    checkpoints: Path,
    ranks: Ranks,
    lease: Lease | None,
    wanted: Callable[[int], bool] = lambda _: True,
    required: bool = True,
) -> Path | None:
    """Return the newest valid checkpoint of a step that is `wanted`, the same on every rank. A collective.

    None if there never was a checkpoint, or none of such a step. Unless it is `required`, also if all of them are
    damaged, or have another format version.
    Damaged ones are set aside with a warning; without a lease, as for a command that only reads, they are skipped.

    Raises:
        UserError: there are such checkpoints, but none is valid; or the newest has another format version.
        OSError: the newest cannot be read, and this is one of the first attempts to fail.
    """
    names = run_on_rank0(ranks, lambda: [path.name for path in layout.found(checkpoints)])
    problems = []
    for name in names:
        path = checkpoints / name
        if not wanted(layout.step_of(path)):
            continue
        try:
            problem, unread = _check(path, ranks)
        except layout.FormatError as error:
            if required:
                raise
            if ranks.world.is_first:
                streams.warn(error)
            continue
        if unread:
            earlier = run_on_rank0(ranks, lambda path=path, one=unread: _failed_before(path, one, lease))  # type: ignore[misc]
            if not earlier:
                raise unread.error
            problem = f"it cannot be read, as {earlier} found as well: {unread.message}"
        if not problem:
            return path
        problems.append(f"{name}: {problem}")
        run_on_rank0(ranks, lambda path=path, problem=problem: _reject(path, problem, lease))  # type: ignore[misc]
    if not names and required:
        # If earlier starts have set all of them aside, the run must not silently start from scratch.
        problems = run_on_rank0(ranks, lambda: [path.name for path in layout.damaged(checkpoints)])
    if problems and required:
        raise UserError(
            f"{checkpoints} has checkpoints, but none is valid ({'; '.join(problems)}): restore one, or start "
            "another --run.name; training is not started over silently"
        )
    return None


def problem_of(path: Path, ranks: Ranks) -> str:
    """Return what is wrong with a checkpoint, or '': the same on every rank. A collective.

    Raises:
        OSError: it cannot be read.
    """
    problem, unread = _check(path, ranks)
    if unread:
        raise unread.error
    return problem


def _check(path: Path, ranks: Ranks) -> tuple[str, Unreadable | None]:
    """Return what is wrong with a checkpoint, or '', and what of it cannot be read: the same on every rank."""
    parts = run_on_rank0(ranks, lambda: _try_twice(lambda: _parts(path), ranks.world.rank))
    if not isinstance(parts, list):
        return _first_problem([parts])
    own = own_parts(parts, ranks.world.rank, ranks.world.size)
    found = gather_from_all(ranks, lambda: _try_twice(lambda: layout.check_checksums(path, own), ranks.world.rank))
    return _first_problem(found)


def _parts(path: Path) -> list[Part] | str:
    """Return the parts of a checkpoint's files, or what is wrong with its structure."""
    return layout.check_structure(path) or parts_of(layout.read_files(path))


def _try_twice(check: Callable[[], T], rank: int) -> T | Unreadable:
    with suppress(OSError):
        return check()
    time.sleep(RETRY_S)  # a network file system may recover
    try:
        return check()
    except OSError as error:
        return Unreadable(
            rank,
            socket.gethostname(),
            error.errno or errno.EIO,
            error.strerror or str(error),
            str(error.filename or ""),
        )


def _first_problem(found: Sequence[str | Unreadable]) -> tuple[str, Unreadable | None]:
    """Return the first problem, or else the first unreadable file: damage counts, whatever could not be read."""
    problem = next((one for one in found if isinstance(one, str) and one), "")
    unread = next((one for one in found if isinstance(one, Unreadable)), None)
    return problem, None if problem else unread


def _failed_before(path: Path, now: Unreadable, lease: Lease | None) -> str:
    """Record that a checkpoint cannot be read; return which earlier attempts could not either, if enough, or ''.

    Rank 0 only. Without a lease, nothing is recorded, and the result is ''.
    """
    if lease is None:
        return ""
    return unreadable.failed_before(path.parents[1], layout.step_of(path), _stamp(path), now, lease)


def _stamp(path: Path) -> str:
    """Return what distinguishes a checkpoint from others of the same step: time and size of its manifest; '' if these
    cannot be read.

    The contents do not: the same step saved again has the same bytes. In whole seconds, since hosts of one network file
    system may see finer times differently.
    """
    try:
        manifest = (path / "manifest.json").stat()
    except OSError:
        return ""
    return f"{int(manifest.st_mtime)}:{manifest.st_size}"


def _reject(path: Path, problem: str, lease: Lease | None) -> None:
    """Set a damaged checkpoint aside; without a lease, only warn."""
    if lease is not None:
        layout.quarantine(path, problem, lease)
    else:
        layout.warn(path, problem)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> State:
    """Load model, optimizer (None: leave it out) and this rank's random generators; return the rest. A collective.

    Tensors in memory may be whole or sharded, and so may those in the files. Of sharded ones a rank reads its own rows;
    what all ranks need is read once, an equal part by each of them. If the world size has changed, the generators are
    not changed.

    Raises:
        UserError: the tensors are not those of this model, this optimizer, or this precision.
    """
    state, names = run_on_rank0(ranks, lambda: (layout.read_state(path), layout.tensor_files(path)))
    targets = _Targets(path, model, optimizer)
    generators = [f"rng/{ranks.world.rank}/{kind}" for kind in ("cpu", "cuda")]
    if optimizer is None or state.world_size != ranks.world.size:
        generators = []
    with stored.Reader(path) as reader:

        def headers() -> list[Stored]:
            return [one for name in names[ranks.world.rank :: ranks.world.size]
                    for one in stored.merged(reader.header(name), targets.is_sharded)]  # fmt: skip

        found = [one for part in gather_from_all(ranks, headers) for one in part]
        seen: dict[str, list[range | None]] = {}
        common: list[Piece] = []
        own_files, own_generators = set(), []
        for one in sorted(found, key=attrgetter("file")):
            seen.setdefault(one.name, []).append(one.rows)
            if one.name in generators:
                own_generators.append(one)
            target = targets.of(one)
            if target is None:
                continue
            if not is_sharded(target):
                part = target[one.rows.start : one.rows.stop] if one.rows else target
                common.append(Piece(one.file, one.start, part, one.dtype))
            elif _own_rows(target, one):
                own_files.add(one.file)
        _check_complete(path, seen, targets, ranks, state)
        stored.read_together(common, reader, ranks)

        def read_own() -> None:
            own = [one for name in sorted(own_files) for one in reader.header(name) if targets.is_sharded(one.name)]
            stored.read((piece for one in own for piece in _own_piece(targets.of(one), one)), reader)
            for one in own_generators:
                _restore_generator(one, reader, ranks)

        gather_from_all(ranks, read_own)
    return state


class _Targets:
    """Where in memory the tensors of a checkpoint belong. `optimizer` is None if its state is not loaded."""

    def __init__(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._path, self._optimizer = path, optimizer
        self.parameters = dict(model.named_parameters())
        self.keys = state_keys(optimizer) if optimizer is not None else {}

    def is_sharded(self, name: str) -> bool:
        """Return whether this rank has only some rows of a tensor."""
        kind, _, rest = name.partition("/")
        parameter, _, key = rest.rpartition("/") if kind == "optim" else (rest, "", "")
        return kind in ("model", "optim") and key != "step" and is_sharded(self.parameters.get(parameter, _NONE))

    def of(self, one: Stored) -> Tensor | None:
        """Return the whole tensor that this belongs to; None if it is not to be loaded.

        Raises:
            UserError: there is none of that name, shape and precision.
        """
        kind, _, rest = one.name.partition("/")
        if kind == "model":
            return _parameter(_named(self.parameters, rest), one, exactly=self._optimizer is not None)
        if kind == "optim" and self._optimizer is not None:
            parameter, _, key = rest.rpartition("/")
            owner = _named(self.parameters, parameter)
            if key not in self.keys[owner]:
                raise UserError(
                    f"{one.name} is not part of this optimizer's state ({', '.join(self.keys[owner])}): set optim.name "
                    "as it was"
                )
            return _state(self._optimizer.state[owner], key, one, owner)
        if kind not in ("model", "optim", "rng", PADDING.rstrip("/")):
            raise InputError(f"{self._path} has an unknown tensor, {one.name}")
        return None


_NONE = torch.empty(0)


def _check_complete(
    path: Path, seen: dict[str, list[range | None]], targets: _Targets, ranks: Ranks, state: State
) -> None:
    """Check that each tensor, and each row, was stored exactly once: none may keep its initial value."""
    parameters, keys = targets.parameters, targets.keys
    expected = {f"model/{name}": len(parameter) for name, parameter in parameters.items()}
    if keys:
        if state.step or any(name.startswith("optim/") for name in seen):
            for name, parameter in parameters.items():
                expected |= {f"optim/{name}/{key}": len(parameter) for key in keys[parameter]}
        if state.world_size == ranks.world.size:
            # Of all ranks, so that all raise the same error, and none waits for the others.
            expected |= {f"rng/{rank}/cpu": 1 for rank in range(ranks.world.size)}
    if missing := sorted(expected.keys() - seen.keys()):
        raise InputError(f"{path} lacks {', '.join(missing[:3])} of this model")
    for name, parts in seen.items():
        if None in parts and len(parts) > 1:
            raise InputError(f"{path} has the tensor {name} twice")
        if None in parts or name not in expected:  # part of an optimizer that is not loaded
            continue
        after = 0
        for rows in sorted((part for part in parts if part is not None), key=lambda rows: rows.start):
            if rows.start != after:
                what = "lacks" if rows.start > after else "has twice some"
                raise InputError(f"{path} {what} rows of {name} before row {max(rows.start, after):,}")
            after = rows.stop
        if after != expected[name]:
            raise InputError(f"{path} lacks rows of {name} after row {after:,} of {expected[name]:,}")


def _named(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter:
    """Return the parameter with this name."""
    if name not in parameters:
        raise InputError(f"the checkpoint has a tensor {name}, and the model has none of that name")
    return parameters[name]


def _state(state: dict[str, Any], key: str, one: Stored, owner: nn.Parameter) -> Tensor:
    """Return a tensor of the optimizer's state of `owner`, which is made if there is none that fits."""
    shape, dtype = ((), torch.float32) if key == "step" else (tuple(owner.shape), owner.dtype)
    found = _whole_shape(one, shape)
    if found != shape or one.dtype != dtype:
        raise InputError(f"{one.name} is {one.dtype} {found} in the checkpoint, expected {dtype} {shape}")
    kept = state.get(key)
    if kept is None or (tuple(kept.shape), kept.dtype, kept.device) != (shape, dtype, owner.device):
        state[key] = torch.zeros((), device=owner.device) if key == "step" else torch.zeros_like(owner)
    return state[key]  # type: ignore[no-any-return]


def _parameter(target: nn.Parameter, one: Stored, exactly: bool) -> Tensor:
    """Return a parameter, after a check that what is stored fits it. `exactly`: the dtypes must be the same."""
    shape, dtype = _whole_shape(one, tuple(target.shape)), one.dtype
    if tuple(target.shape) != shape:
        raise InputError(f"{one.name} is {shape} in the checkpoint and {tuple(target.shape)} in the model")
    if target.dtype != dtype and (exactly or not dtype.is_floating_point):
        raise InputError(
            f"{one.name} is {dtype} in the checkpoint and {target.dtype} in the model: set train.dtype as it was"
        )
    return target.detach()


def _whole_shape(one: Stored, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the whole tensor, after a check that as many rows are stored as their name says."""
    if one.rows is None:
        return one.shape
    if not expected or not one.fits or one.rows.stop > expected[0]:
        raise InputError(f"{one.key} is {one.shape} in the checkpoint, expected rows of {expected}")
    return (expected[0], *one.shape[1:])


def _own_rows(target: Tensor, one: Stored) -> range:
    """Return the rows of `target` that this rank has and that are stored here."""
    own, rows = local_rows(target), one.rows or range(len(target))
    return range(max(own.start, rows.start), min(own.stop, rows.stop))


def _own_piece(target: Tensor | None, one: Stored) -> Iterator[Piece]:
    """Yield what this rank reads of the rows that are stored here, if anything."""
    assert target is not None
    if rows := _own_rows(target, one):
        own, first = local_rows(target), one.rows.start if one.rows else 0
        local = own.local[rows.start - own.start : rows.stop - own.start]
        yield Piece(one.file, one.start + (rows.start - first) * one.row_bytes, local, one.dtype)


def _restore_generator(one: Stored, reader: Reader, ranks: Ranks) -> None:
    """Set a random generator of this rank."""
    state = torch.empty(one.shape, dtype=one.dtype)
    stored.read([Piece(one.file, one.start, state, one.dtype)], reader)
    try:
        if one.name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state, ranks.device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{one.name} is not the state of a random generator: {error}") from None
