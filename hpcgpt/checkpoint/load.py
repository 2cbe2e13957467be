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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpcgpt import errors
from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.distributed.collectives import gather_from_all, run_on_rank0
from hpcgpt.distributed.sharded_tensor import is_sharded, local_rows
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import InputError, UserError
from hpcgpt.optim.optimizer import state_keys
from hpcgpt.run import run_folder
from hpcgpt.storage.lease import Lease

RETRY_S = 0.5
FAILED_ATTEMPTS = 2  # earlier ones that could not read a checkpoint, on any host, until it is set aside


def newest_valid(
    checkpoints: Path, ranks: Ranks, lease: Lease | None, wanted: Callable[[int], bool] = lambda _: True
) -> Path | None:
    """Return the newest valid checkpoint of a step that is `wanted`, the same on every rank. A collective.

    None if there never was a checkpoint, or none of such a step. Damaged ones are set aside with a warning; without a
    lease, as for a command that only reads, they are skipped.

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
        problem, unreadable = _check(path, ranks)
        if unreadable:
            earlier = run_on_rank0(ranks, lambda path=path, one=unreadable: _failed_before(path, one, lease))  # type: ignore[misc]
            if not earlier:
                raise unreadable.error
            problem = f"it cannot be read, as {earlier} found as well: {unreadable.message}"
        if not problem:
            return path
        problems.append(f"{name}: {problem}")
        run_on_rank0(ranks, lambda path=path, problem=problem: _reject(path, problem, lease))  # type: ignore[misc]
    if not names:
        # If earlier starts have set all of them aside, the run must not silently start from scratch.
        problems = run_on_rank0(ranks, lambda: [path.name for path in layout.damaged(checkpoints)])
    if problems:
        raise UserError(
            f"{checkpoints} has checkpoints, but none is valid ({'; '.join(problems)}): restore one, or start "
            "another --run.name; training is not started over silently"
        )
    return None


@dataclass(frozen=True)
class _Unreadable:
    """A file that a rank could not read, and why."""

    rank: int
    host: str
    errno: int
    reason: str
    file: str

    @property
    def message(self) -> str:
        return f"{self.file}: {self.reason}"

    @property
    def error(self) -> OSError:
        error = OSError(self.errno, self.reason, self.file)
        errors.mark(error, self.rank)
        return error


def _check(path: Path, ranks: Ranks) -> tuple[str, _Unreadable | None]:
    """Return what is wrong with a checkpoint, or '', and what of it cannot be read: the same on every rank."""
    rank = ranks.world.rank
    found = run_on_rank0(ranks, lambda: _try_twice(lambda: layout.check_structure(path), rank))
    if found != "":
        return _first_problem([found])

    def check_share() -> str:
        names = sorted(layout.read_files(path))
        return layout.check_checksums(path, names[rank :: ranks.world.size])

    return _first_problem(gather_from_all(ranks, lambda: _try_twice(check_share, rank)))


def _try_twice(check: Callable[[], str], rank: int) -> str | _Unreadable:
    with suppress(OSError):
        return check()
    time.sleep(RETRY_S)  # a network file system may recover
    try:
        return check()
    except OSError as error:
        return _Unreadable(
            rank,
            socket.gethostname(),
            error.errno or errno.EIO,
            error.strerror or str(error),
            str(error.filename or ""),
        )


def _first_problem(found: list[str | _Unreadable]) -> tuple[str, _Unreadable | None]:
    """Return the first problem, or else the first unreadable file: damage counts, whatever could not be read."""
    problem = next((one for one in found if isinstance(one, str) and one), "")
    unreadable = next((one for one in found if isinstance(one, _Unreadable)), None)
    return problem, None if problem else unreadable


def _failed_before(path: Path, now: _Unreadable, lease: Lease | None) -> str:
    """Record that a checkpoint cannot be read; return which earlier attempts could not either, if enough, or ''.

    Rank 0 only. Without a lease, nothing is recorded, and the result is ''.
    """
    if lease is None:
        return ""
    run, step, identity = path.parents[1], layout.step_of(path), _stamp(path)
    found: list[dict[str, Any]] = []
    for event in run_folder.events(run):
        if event.get("step") != step:
            continue
        if event.get("event") == "save" or event.get("set_aside"):
            found = []  # earlier events are about one that was replaced, or restored, since
        # If its identity is not known, its step is enough: a disk that cannot be read must not block the run.
        elif (
            event.get("event") == "unreadable"
            and event.get("attempt") != lease.number
            and (not identity or event.get("identity", "") in ("", identity))
        ):
            found.append(event)
    hosts = {str(event.get("host")) for event in found}
    enough = len({event.get("attempt") for event in found}) >= FAILED_ATTEMPTS or bool(hosts - {now.host})
    with suppress(OSError):  # if it is not recorded, the next failure counts as the first
        run_folder.record(
            run, "unreadable", attempt=lease.number, step=step, rank=now.rank, host=now.host, problem=now.message,
            identity=identity, set_aside=enough,
        )  # fmt: skip
    return (
        f"{len(found)} earlier attempt{'s' if len(found) > 1 else ''} on {', '.join(sorted(hosts))}" if enough else ""
    )


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
    """Load model, optimizer (None: leave it out) and this rank's random generators; return the rest.

    Tensors in memory may be whole or sharded, and so may those in the files; only the needed rows are read. If the
    world size has changed, the generators are not changed.

    Raises:
        UserError: the tensors are not those of this model, this optimizer, or this precision.
    """
    state = layout.read_state(path)
    parameters = dict(model.named_parameters())
    keys = state_keys(optimizer) if optimizer is not None else {}
    generators = [f"rng/{ranks.world.rank}/{kind}" for kind in ("cpu", "cuda")]
    if state.world_size != ranks.world.size:
        generators = []
    seen: dict[str, list[range | None]] = {}
    for stored in _tensors(path, state):
        seen.setdefault(stored.name, []).append(stored.rows)
        kind, _, rest = stored.name.partition("/")
        if kind == "model":
            _fill(_named(parameters, rest), stored, exactly=optimizer is not None)
        elif kind == "optim" and optimizer is not None:
            parameter, _, key = rest.rpartition("/")
            owner = _named(parameters, parameter)
            if key not in keys[owner]:
                raise UserError(
                    f"{stored.name} is not part of this optimizer's state ({', '.join(keys[owner])}): set optim.name "
                    "as it was"
                )
            _fill_state(optimizer.state[owner], key, stored, owner)
        elif stored.name in generators and optimizer is not None:
            _restore_generator(stored.name, stored.read(), ranks)
        elif kind not in ("model", "optim", "rng"):
            raise InputError(f"{path} has an unknown tensor, {stored.name}")
    _check_complete(path, seen, parameters, keys, ranks, state)
    return state


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file of a checkpoint, or `rows` of it; None: all rows."""

    share: Path
    file: Any
    key: str
    name: str
    rows: range | None

    def shape(self) -> tuple[int, ...]:
        return tuple(self._try(lambda: self.file.get_slice(self.key).get_shape()))

    def read(self) -> Tensor:
        return self._try(lambda: self.file.get_tensor(self.key))  # type: ignore[no-any-return]

    def read_rows(self, first: int, after: int) -> Tensor:
        """Read some of the rows that are stored here, counted from the first of them."""
        return self._try(lambda: self.file.get_slice(self.key)[first:after])  # type: ignore[no-any-return]

    def _try(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (SafetensorError, AttributeError, TypeError) as error:  # a dtype that this torch does not have
            raise InputError(f"{self.share}: {self.key} cannot be read: {error}") from None


def _tensors(path: Path, state: State) -> Iterator[_Stored]:
    """Yield what is stored in a checkpoint."""
    for rank in range(state.world_size):
        share = path / layout.share_name(rank, state.world_size)
        try:
            with safe_open(share, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield _Stored(share, file, key, *layout.rows_of(key))
        except SafetensorError as error:
            raise InputError(f"{share}: {error}") from None
        except MemoryError as error:  # no memory for another map: the fault of the host
            raise OSError(errno.ENOMEM, f"{share}: {error}") from None
        except RuntimeError as error:  # torch could not open or map it, though its checksum was read before
            raise OSError(errno.EIO, f"{share}: {error}") from None


def _check_complete(
    path: Path,
    seen: dict[str, list[range | None]],
    parameters: dict[str, nn.Parameter],
    keys: dict[nn.Parameter, tuple[str, ...]],
    ranks: Ranks,
    state: State,
) -> None:
    """Check that each tensor, and each row, was stored exactly once: none may keep its initial value."""
    expected = {f"model/{name}": len(parameter) for name, parameter in parameters.items()}
    if keys:
        if state.step or any(name.startswith("optim/") for name in seen):
            for name, parameter in parameters.items():
                expected |= {f"optim/{name}/{key}": len(parameter) for key in keys[parameter]}
        if state.world_size == ranks.world.size:
            expected[f"rng/{ranks.world.rank}/cpu"] = 1
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


def _fill_state(state: dict[str, Any], key: str, stored: _Stored, owner: nn.Parameter) -> None:
    """Set a tensor of the optimizer's state of `owner`, or the rows of it that are stored here."""
    shape, dtype = ((), torch.float32) if key == "step" else (tuple(owner.shape), owner.dtype)
    whole = stored.rows is None and (key == "step" or not is_sharded(owner))
    if whole:
        value = stored.read()
        if tuple(value.shape) == shape and value.dtype == dtype:
            state[key] = value.to(owner.device)
            return
        found, found_dtype = tuple(value.shape), value.dtype
    else:
        found = _whole_shape(stored, shape)
        found_dtype = stored.read_rows(0, 0).dtype if found else torch.float32
    if found != shape or not found or found_dtype != dtype:
        raise InputError(f"{stored.name} is {found_dtype} {found} in the checkpoint, expected {dtype} {shape}")
    if key not in state:
        state[key] = torch.zeros_like(owner)
    _fill_rows(state[key], stored)


def _fill(target: nn.Parameter, stored: _Stored, exactly: bool) -> None:
    """Set a parameter, or the rows of it that are stored here. `exactly`: the dtypes must be the same."""
    shape = _whole_shape(stored, tuple(target.shape))
    if tuple(target.shape) != shape:
        raise InputError(f"{stored.name} is {shape} in the checkpoint and {tuple(target.shape)} in the model")
    dtype = stored.read_rows(0, 0).dtype
    if target.dtype != dtype and (exactly or not dtype.is_floating_point):
        raise InputError(
            f"{stored.name} is {dtype} in the checkpoint and {target.dtype} in the model: set train.dtype as it was"
        )
    _fill_rows(target.detach(), stored)


def _whole_shape(stored: _Stored, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the whole tensor, after a check that as many rows are stored as their name says."""
    shape, rows = stored.shape(), stored.rows
    if rows is None:
        return shape
    if not expected or not shape or shape[0] != len(rows) or not rows or rows.stop > expected[0]:
        raise InputError(f"{stored.key} is {shape} in the checkpoint, expected rows of {expected}")
    return (expected[0], *shape[1:])


@torch.no_grad()
def _fill_rows(target: Tensor, stored: _Stored) -> None:
    """Copy the rows that are stored here and that this rank has."""
    own, rows = local_rows(target), stored.rows or range(len(target))
    first, after = max(own.start, rows.start), min(own.stop, rows.stop)
    if first < after:
        own.local[first - own.start : after - own.start].copy_(stored.read_rows(first - rows.start, after - rows.start))


def _restore_generator(name: str, state: Tensor, ranks: Ranks) -> None:
    """Set a random generator of this rank."""
    try:
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state, ranks.device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{name} is not the state of a random generator: {error}") from None
