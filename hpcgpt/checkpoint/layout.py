"""The format of checkpoints on disk.

::

    checkpoints/
      step_000001000/
        tensors_00000_of_00004.safetensors    a share of all tensors from each rank
        ...
        state.json                            see State
        manifest.json                         bytes and checksums of the files above, and its own; written last
      .step_000002000.g0003.tmp/              being written by generation 3
      damaged_step_000000500.g0003/           set aside by generation 3, with the reason in REASON.txt

The tensors are spread over the ranks by size: ``model/<parameter>``, ``optim/<parameter>/<state>``, and
``rng/<rank>/cpu`` (and ``/cuda``), the state of each rank's random generators as bytes. A tensor of which each rank had
only some rows (parallel.mode zero1, zero2 and fsdp) is divided among the shares of those ranks: ``<name>[0:384]``,
``<name>[384:768]``, with the first row and the one after the last. Each row is stored once; a run can resume from it in
any mode.

``checkpoint.files`` limits the number of files. Where there are more ranks, consecutive ranks write into one file, each
at its own places (``hpcgpt.checkpoint.parts``). Such a checkpoint has format version 3: the manifest has a checksum for
each part of a file that one rank has written, and tensors ``padding/<rank>`` fill up pages.

A folder without its manifest is never loaded, and no file is used unless its checksums are those in the manifest. All
files are safetensors or JSON: nothing in a checkpoint can run code.

The checksum is XXH3 with 128 bits. It protects from faulty disks and networks, not from people: a user with write
access to the folder can also write a manifest. SHA-256 ran at a tenth of its speed here, and would take a core from
training for longer.

Written by ``hpcgpt.checkpoint.save``, loaded by ``hpcgpt.checkpoint.load``, removed by ``hpcgpt.checkpoint.retention``.
No torch in here.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from hpcgpt.checkpoint.parts import Part, parts_of
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.run import row_search
from hpcgpt.storage import safetensors_header
from hpcgpt.storage.lease import Lease
from hpcgpt.storage.safetensors_header import HeaderError

FORMAT, VERSION = "hpcgpt-checkpoint", 2
VERSION_WITH_PARTS = 3  # several ranks have written into one file
JSON_LIMIT = 64 << 20  # bytes; no state.json or manifest.json of ours is larger
_NAME = re.compile(r"step_(\d{9,})")
_NAME_WITH_ROWS = re.compile(r"(.*)\[(\d{1,18}):(\d{1,18})\]", re.ASCII)
_FILE = re.compile(r"(tensors_\d{5}_of_(\d{5})\.safetensors|state\.json)")
# These mean that a file is missing. Any other error may be the fault of this host or the network, and is no damage.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@dataclass
class TrainState:
    """The progress of training. `State` has each of these fields, too.

    `pending` is the metrics row of this step, if the run was stopped before its evaluation had ended; `val_loss` in
    nats, if this step was evaluated. `skipped` global batches were left out by `rollbacks` rollbacks so far: step s
    uses global batch s + skipped.
    """

    step: int = 0
    pending: dict[str, Any] | None = None
    val_loss: float | None = None
    skipped: int = 0
    rollbacks: int = 0

    def become(self, saved: State) -> None:
        """Take the values of a checkpoint."""
        for item in fields(self):
            setattr(self, item.name, getattr(saved, item.name))


@dataclass(frozen=True)
class State:
    """The contents of state.json. For `pending`, `val_loss`, `skipped` and `rollbacks` see TrainState.

    `identity` is what must not change between attempts. `in_effect` is what the attempt that saved it computed with:
    see ``hpcgpt.training.in_effect``; empty in older checkpoints.
    """

    step: int
    tokens: int
    samples: int
    world_size: int
    identity: dict[str, Any]
    pending: dict[str, Any] | None = None
    val_loss: float | None = None
    skipped: int = 0
    rollbacks: int = 0
    in_effect: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = (self.step, self.tokens, self.samples, self.world_size, self.skipped, self.rollbacks)
        if not all(type(count) is int and count >= 0 for count in counts) or self.world_size < 1:
            raise ValueError(f"impossible counts {counts}")
        objects = (self.identity, self.in_effect, {} if self.pending is None else self.pending)
        if not all(isinstance(part, dict) for part in objects):
            raise ValueError("identity, in_effect and pending must be objects")
        if not isinstance(self.val_loss, float | None):
            raise ValueError(f"val_loss {self.val_loss!r} is no number")


class FormatError(UserError):
    """A checkpoint has another format version. It may be whole, so it is not set aside."""


# --- names -----------------------------------------------------------------------------------------


def path_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:09d}"


def temporary_of(final: Path, generation: int) -> Path:
    return final.with_name(f".{final.name}.g{generation:04d}.tmp")


def share_name(number: int, files: int) -> str:
    """Return the name of one of `files` files with tensors; where each rank has its own, `number` is the rank."""
    return f"tensors_{number:05d}_of_{files:05d}.safetensors"


def found(checkpoints: Path) -> list[Path]:
    """Return the checkpoints, the newest first, valid or not.

    Raises:
        OSError: the folder exists, but cannot be read.
    """
    return sorted((path for path in entries(checkpoints) if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def entries(folder: Path) -> list[Path]:
    """Return the contents of a folder, [] if it does not exist. Unlike glob, raise OSError if it cannot be read."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def rows_of(name: str) -> tuple[str, range | None]:
    """Split a stored name into the name of the tensor and the stored rows; None: all rows."""
    match = _NAME_WITH_ROWS.fullmatch(name)
    return (match[1], range(int(match[2]), int(match[3]))) if match else (name, None)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


# --- writing and reading the small files -----------------------------------------------------------


def state_bytes(state: State) -> bytes:
    return json.dumps(asdict(state)).encode()


def manifest_bytes(files: dict[str, Any], generation: int) -> bytes:
    """Return the contents of manifest.json.

    `files`: name -> {"bytes": int, "xxh3": hex}; or, instead of "xxh3", "parts": a list of such, in their order.
    """
    version = VERSION_WITH_PARTS if any("parts" in about for about in files.values()) else VERSION
    manifest = {"format": FORMAT, "version": version, "generation": generation, "files": files}
    return json.dumps(manifest | {"digest": _digest(manifest)}, indent=1).encode()


def read_state(checkpoint: Path) -> State:
    """Read state.json, after `verify`. Raises ValueError, TypeError or OSError if it is not valid."""
    return State(**_json(checkpoint / "state.json"))


def val_loss(checkpoint: Path) -> float | None:
    """Return the validation loss in nats; None if this step was not evaluated. Raises as `read_state`.

    If the evaluation was interrupted, the loss is in the run's metrics.jsonl, written by the next attempt.
    """
    state = read_state(checkpoint)
    if state.pending is None:
        return state.val_loss
    try:
        loss = row_search.row_of(checkpoint.parents[1] / "metrics.jsonl", state.step).get("val/loss")
    except FileNotFoundError:
        return None
    return loss if isinstance(loss, float) else None


def best(
    checkpoints: Iterable[Path], loss_of: Callable[[Path], float | None], is_whole: Callable[[Path], bool]
) -> Path | None:
    """Return the whole checkpoint with the smallest validation loss, the newest of equal ones; None if there is none.

    `loss_of` returns None for a checkpoint that is no candidate. `is_whole` is called for candidates, the best first,
    until it returns True. Both decide what an error means.
    """
    candidates = []
    for path in checkpoints:
        loss = loss_of(path)
        if loss is not None and math.isfinite(loss):
            candidates.append((loss, -step_of(path), path))
    return next((path for _, _, path in sorted(candidates) if is_whole(path)), None)


def read_files(checkpoint: Path) -> dict[str, Any]:
    """Return the files of a checkpoint, by name, from its manifest. Raises as `read_state`, and KeyError."""
    return dict(_json(checkpoint / "manifest.json")["files"])


def tensor_files(checkpoint: Path) -> list[str]:
    """Return the names of the files with tensors, in order. Raises as `read_files`."""
    return sorted(set(read_files(checkpoint)) - {"state.json"})


def _json(path: Path) -> dict[str, Any]:
    if (problem := _not_a_file(path)) or path.stat().st_size > JSON_LIMIT:
        raise ValueError(problem or f"{path.name} is larger than {JSON_LIMIT >> 20} MB")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no object")
    return content


def _digest(manifest: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode()))


# --- verifying -------------------------------------------------------------------------------------


def verify(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint; '' if it is whole.

    Raises:
        FormatError: it has another format version.
        OSError: a file exists, but cannot be read.
    """
    problem = check_structure(checkpoint)
    return problem or check_checksums(checkpoint, parts_of(read_files(checkpoint)))


def check_structure(checkpoint: Path) -> str:
    """Check manifest, names, sizes and state, but not the checksums of files; return what is wrong, or ''.

    Raises:
        FormatError: it has another format version.
        OSError: a file exists, but cannot be read.
    """
    try:
        manifest = _json(checkpoint / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, expected {FORMAT}"
        if type(manifest["version"]) is not int:
            return f"its manifest cannot be read: version {manifest['version']!r}"
        digest = manifest.pop("digest", None)
        if manifest["version"] not in (VERSION, VERSION_WITH_PARTS) and digest in (_digest(manifest), None):
            raise FormatError(
                f"{checkpoint} has format version {manifest['version']}, and this program reads {VERSION} and "
                f"{VERSION_WITH_PARTS}: use the hpcgpt that wrote it, or start another --run.name"
            )
        if digest != _digest(manifest):
            return "its manifest's own checksum does not hold"
        files = manifest["files"]
        if not all(_FILE.fullmatch(name) for name in files) or "state.json" not in files:
            return f"its manifest names {', '.join(repr(name[:80]) for name in sorted(files)[:3])}"
        parts_of(files)
        for name, expected in files.items():
            path = checkpoint / name
            if problem := _not_a_file(path):
                return problem
            if (size := _size_of(path, expected["bytes"])) != expected["bytes"]:
                return f"{name} has {size:,} bytes, expected {expected['bytes']:,}"
        state = read_state(checkpoint)
        if checkpoint.name != f"step_{state.step:09d}":
            return f"it holds step {state.step}"
        count = state.world_size if manifest["version"] == VERSION else _count(files)
        shares = [share_name(number, count) for number in range(min(count, len(files)))]
        if set(shares) != set(files) - {"state.json"} or not shares:
            return f"it lacks {', '.join(sorted(set(shares) - set(files))[:3]) or 'shares of tensors'}"
    except FormatError:
        raise
    except OSError as error:
        if error.errno not in MISSING:
            raise
        return f"{Path(error.filename or '').name}: {error.strerror}"
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return f"its manifest or state cannot be read: {error!r}"
    return ""


def _size_of(path: Path, expected: int) -> int:
    """Return the size of a file, which an NFS client may learn only when it opens it, if several hosts write."""
    size = path.stat().st_size
    if size != expected:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    return size


def _count(files: dict[str, Any]) -> int:
    """Return how many files with tensors there should be, by the name of one of them."""
    return max(int(found[2] or 0) for name in files if (found := _FILE.fullmatch(name)))


def check_checksums(checkpoint: Path, parts: Iterable[Part]) -> str:
    """Name the first file of which one of `parts` has another checksum, after `check_structure`; '' if none has.

    Raises:
        OSError: a file cannot be read, which may be the fault of this host, and is no damage.
    """
    for name, of_file in itertools.groupby(parts, key=attrgetter("file")):
        with open(checkpoint / name, "rb") as file:
            for part in of_file:
                if _checksum(file, part) != part.xxh3:
                    return f"the checksum of {name} is not the one in the manifest"
                if part.start == 0 and (problem := _header_problem(file, checkpoint / name)):
                    return problem
    return ""


def _header_problem(file: BinaryIO, path: Path) -> str:
    if path.suffix != ".safetensors":
        return ""
    try:
        safetensors_header.read(file.fileno(), path)
        return ""
    except HeaderError as error:
        return f"{path.name} has {error}"


def _checksum(file: BinaryIO, part: Part) -> str:
    digest, left = xxhash.xxh3_128(), part.bytes
    file.seek(part.start)
    while chunk := file.read(min(left, 8 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return str(digest.hexdigest())


def quarantine(checkpoint: Path, problem: str, lease: Lease) -> None:
    """Set a damaged checkpoint aside with a warning: rename it, and delete nothing."""
    name, count = f"damaged_{checkpoint.name}.g{lease.number:04d}", 1
    aside = checkpoint.with_name(name)
    while aside.is_symlink() or aside.exists():  # the same step, saved again and damaged again
        count += 1
        aside = checkpoint.with_name(f"{name}.{count}")
    checkpoint.rename(aside)
    lease.check()  # if a newer generation exists, no reason is written, and it is restored: see retention
    # On a full disk there is only the warning below. What a link points to is not ours.
    with suppress(OSError):
        if not aside.is_symlink():
            (aside / "REASON.txt").write_bytes(f"{problem}\n".encode(errors="backslashreplace"))
    warn(checkpoint, f"{problem}; set aside as {aside.name}")


def warn(checkpoint: Path, problem: str) -> None:
    """Warn that a checkpoint is damaged."""
    streams.warn(f"checkpoint {checkpoint} is damaged: {problem}")


def _not_a_file(path: Path) -> str:
    """Return a problem unless `path` is a regular file: reading a pipe or a device might never end."""
    mode = path.lstat().st_mode
    return "" if stat.S_ISREG(mode) else f"{path.name} is no regular file"


def damaged(checkpoints: Path) -> list[Path]:
    """Return the checkpoints that were set aside."""
    return sorted(path for path in entries(checkpoints) if path.name.startswith("damaged_step_"))
