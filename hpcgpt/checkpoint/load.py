"""Going on from a checkpoint: the newest valid one is chosen by all ranks together, and loaded by each.

Rank 0 looks what there is and whether it fits together; the checksums are shared out over the ranks. What is
damaged is set aside, and the one before is used.

One that cannot be read (EIO, ESTALE; tried twice) is perhaps whole, and the host's fault: so the attempt crashes, and
the requeue policy may choose other nodes. But a bad block must not end a run. Once an attempt on another host could not
read it either, or two earlier ones on any, it is set aside like a damaged one, with a loud line, and the one before is
used. Nothing of it is deleted: a person can give it its name back once the disk is well. It has to be moved, since the
run will make that step once more, and must not meet the two in one place. Each failure is an event, ``unreadable``. It
says nothing about a checkpoint of the same step that was made, or brought back, after that.
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
ATTEMPTS = 2  # so many earlier ones that could not read a checkpoint are enough, on whatever host


def newest_valid(
    checkpoints: Path, ranks: Ranks, lease: Lease | None, wanted: Callable[[int], bool] = lambda _: True
) -> Path | None:
    """The newest valid checkpoint of a step that is `wanted`, the same on every rank; None if there never was one, or
    none of such a step. A collective.

    Damaged ones are set aside with a loud line; by a reader, who holds no generation, they are only passed over.

    Raises:
        UserError: there are such checkpoints, and none is valid; or the newest is of another format version.
        OSError: the newest cannot be read, by the first attempts that try.
    """
    names = run_on_rank0(ranks, lambda: [path.name for path in layout.found(checkpoints)])
    problems = []
    for name in names:
        path = checkpoints / name
        if not wanted(layout.step_of(path)):
            continue
        problem, unreadable = _problem(path, ranks)
        if unreadable:
            earlier = run_on_rank0(ranks, lambda path=path, one=unreadable: _failed_before(path, one, lease))  # type: ignore[misc]
            if not earlier:
                raise unreadable.error
            problem = f"it cannot be read, as {earlier} found as well: {unreadable.words}"
        if not problem:
            return path
        problems.append(f"{name}: {problem}")
        run_on_rank0(ranks, lambda path=path, problem=problem: _tell(path, problem, lease))  # type: ignore[misc]
    if not names:  # Those that earlier starts set aside: there was training, and it must not silently begin anew.
        problems = run_on_rank0(ranks, lambda: [path.name for path in layout.damaged(checkpoints)])
    if problems:
        raise UserError(
            f"{checkpoints} has checkpoints, but none is valid ({'; '.join(problems)}): bring one back, or start "
            "another --run.name; training is not started over silently"
        )
    return None


@dataclass(frozen=True)
class _Unreadable:
    """What a rank could not read, and why."""

    rank: int
    host: str
    errno: int
    reason: str
    file: str

    @property
    def words(self) -> str:
        return f"{self.file}: {self.reason}"

    @property
    def error(self) -> OSError:
        error = OSError(self.errno, self.reason, self.file)
        errors.mark(error, self.rank)
        return error


def _problem(path: Path, ranks: Ranks) -> tuple[str, _Unreadable | None]:
    """What is wrong with a checkpoint, '' if it is whole; and what could not be read of it. The same on every rank."""
    rank = ranks.world.rank
    found = run_on_rank0(ranks, lambda: _twice(lambda: layout.check_structure(path), rank))
    if found != "":
        return _told_apart([found])

    def mine() -> str:
        names = sorted(layout.read_files(path))
        return layout.check_checksums(path, names[rank :: ranks.world.size])

    return _told_apart(gather_from_all(ranks, lambda: _twice(mine, rank)))


def _twice(look: Callable[[], str], rank: int) -> str | _Unreadable:
    with suppress(OSError):
        return look()
    time.sleep(RETRY_S)  # a network file system may have been out of order for a moment
    try:
        return look()
    except OSError as error:
        return _Unreadable(
            rank,
            socket.gethostname(),
            error.errno or errno.EIO,
            error.strerror or str(error),
            str(error.filename or ""),
        )


def _told_apart(found: list[str | _Unreadable]) -> tuple[str, _Unreadable | None]:
    """The first problem, which is damage whatever else could not be read."""
    problem = next((one for one in found if isinstance(one, str) and one), "")
    unreadable = next((one for one in found if isinstance(one, _Unreadable)), None)
    return problem, None if problem else unreadable


def _failed_before(path: Path, now: _Unreadable, lease: Lease | None) -> str:
    """Which earlier attempts could not read this checkpoint, if they are enough to do without it; else ''.

    By rank 0 alone; a reader, who holds no generation, waits for nobody.
    """
    if lease is None:
        return ""
    run, step, identity = path.parents[1], layout.step_of(path), _identity(path)
    found: list[dict[str, Any]] = []
    for event in run_folder.events(run):
        if event.get("step") != step:
            continue
        if event.get("event") == "save" or event.get("set_aside"):
            found = []  # those before were about another one, or about one that a person has brought back since
        # Where it is not known which one it was, the step has to do: a disk that shows nothing must not block the run.
        elif (
            event.get("event") == "unreadable"
            and event.get("attempt") != lease.number
            and (not identity or event.get("identity", "") in ("", identity))
        ):
            found.append(event)
    hosts = {str(event.get("host")) for event in found}
    enough = len({event.get("attempt") for event in found}) >= ATTEMPTS or bool(hosts - {now.host})
    with suppress(OSError):  # then it counts as the first failure, next time
        run_folder.record(
            run, "unreadable", attempt=lease.number, step=step, rank=now.rank, host=now.host, problem=now.words,
            identity=identity, set_aside=enough,
        )  # fmt: skip
    return (
        f"{len(found)} earlier attempt{'s' if len(found) > 1 else ''} on {', '.join(sorted(hosts))}" if enough else ""
    )


def _identity(path: Path) -> str:
    """What tells a checkpoint from another one of the same step: when its manifest was written, and its size; '' if
    not even that can be seen.

    Not what is in it: made again, the step has the same bytes. In whole seconds, since hosts of one network file system
    may see finer times differently.
    """
    try:
        manifest = (path / "manifest.json").stat()
    except OSError:
        return ""
    return f"{int(manifest.st_mtime)}:{manifest.st_size}"


def _tell(path: Path, problem: str, lease: Lease | None) -> None:
    if lease is not None:
        layout.quarantine(path, problem, lease)
    else:
        layout.warn(path, problem)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> State:
    """Fill model, optimizer (None: leave it out) and this rank's random generators; returns the rest.

    Each may be whole, or this rank's share, and so may what is stored: nothing more is read than is needed. On another
    world size than the checkpoint's the generators are left as they are.

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
                    f"{stored.name} is nothing that the optimizer keeps of it ({', '.join(keys[owner])}): set "
                    "optim.name as it was"
                )
            _fill_state(optimizer.state[owner], key, stored, owner)
        elif stored.name in generators and optimizer is not None:
            _restore_generator(stored.name, stored.read(), ranks)
        elif kind not in ("model", "optim", "rng"):
            raise InputError(f"{path} has a tensor {stored.name}, which is nothing that this program knows")
    _check_complete(path, seen, parameters, keys, ranks, state)
    return state


@dataclass(frozen=True)
class _Stored:
    """A tensor of a checkpoint, or the `rows` of it that lie in one file; None: it is whole."""

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
        """Rows of what is stored here, counted from its first."""
        return self._try(lambda: self.file.get_slice(self.key)[first:after])  # type: ignore[no-any-return]

    def _try(self, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except (SafetensorError, AttributeError, TypeError) as error:  # a dtype that this torch does not have
            raise InputError(f"{self.share}: {self.key} cannot be read: {error}") from None


def _tensors(path: Path, state: State) -> Iterator[_Stored]:
    for rank in range(state.world_size):
        share = path / layout.share_name(rank, state.world_size)
        try:
            with safe_open(share, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    yield _Stored(share, file, key, *layout.rows_of(key))
        except SafetensorError as error:
            raise InputError(f"{share}: {error}") from None
        except MemoryError as error:  # no room for another map: the host's fault
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
    """A tensor that is not there must not leave its place at what it was by chance, nor be there in two versions."""
    expected = {f"model/{name}": len(parameter) for name, parameter in parameters.items()}
    if keys:
        if state.step or any(name.startswith("optim/") for name in seen):
            for name, parameter in parameters.items():
                expected |= {f"optim/{name}/{key}": len(parameter) for key in keys[parameter]}
        if state.world_size == ranks.world.size:
            expected[f"rng/{ranks.world.rank}/cpu"] = 1
    if missing := sorted(expected.keys() - seen.keys()):
        raise InputError(f"{path} lacks {', '.join(missing[:3])} of this model")
    for name, pieces in seen.items():
        if None in pieces and len(pieces) > 1:
            raise InputError(f"{path} has the tensor {name} twice")
        if None in pieces or name not in expected:  # the optimizer's, for whom only wants the weights
            continue
        after = 0
        for rows in sorted((piece for piece in pieces if piece is not None), key=lambda rows: rows.start):
            if rows.start != after:
                what = "lacks" if rows.start > after else "has twice some"
                raise InputError(f"{path} {what} rows of {name} before row {max(rows.start, after):,}")
            after = rows.stop
        if after != expected[name]:
            raise InputError(f"{path} lacks rows of {name} behind row {after:,} of {expected[name]:,}")


def _named(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter:
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
    """The shape that the tensor has, of which some rows are stored: if those are as many as their name says."""
    shape, rows = stored.shape(), stored.rows
    if rows is None:
        return shape
    if not expected or not shape or shape[0] != len(rows) or not rows or rows.stop > expected[0]:
        raise InputError(f"{stored.key} is {shape} in the checkpoint, expected rows of {expected}")
    return (expected[0], *shape[1:])


@torch.no_grad()
def _fill_rows(target: Tensor, stored: _Stored) -> None:
    """Those rows that are stored here, and that this rank has."""
    own, rows = local_rows(target), stored.rows or range(len(target))
    first, after = max(own.start, rows.start), min(own.stop, rows.stop)
    if first < after:
        own.local[first - own.start : after - own.start].copy_(stored.read_rows(first - rows.start, after - rows.start))


def _restore_generator(name: str, state: Tensor, ranks: Ranks) -> None:
    try:
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state, ranks.device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{name} is no state of a random generator: {error}") from None
