"""The on-disk form of a run's state.

::

    checkpoints/
      step_000001000/
        tensors_00000_of_00004.safetensors    a share of all tensors from each rank
        ...
        state.json                            see State
        manifest.json                         bytes and checksums of the files above, and its own; written last
      .step_000002000.g0003.tmp/              being written by generation 3
      damaged_step_000000500.g0003/           set aside by generation 3, with the reason in REASON.txt

The tensors, spread over the ranks by size: ``model/<parameter>``, ``optim/<parameter>/<state>``, and
``rng/<rank>/cpu`` (and ``/cuda``), the state of each rank's random generators as bytes. A tensor of which each rank had
some rows only (parallel.mode zero1 and fsdp) is in pieces, in the shares of those ranks: ``<name>[0:384]``,
``<name>[384:768]``, the first row and the one after the last. Each row is there once; a run resumes from it in any
mode.

A folder without its manifest does not exist as far as loading is concerned, and nothing is believed that the
manifest's checksums do not bear out. safetensors and JSON only: nothing in a checkpoint can run code.

The checksum is XXH3 with 128 bits: against disks and networks, not people. A user with write access to the folder can
also write a manifest. SHA-256 ran at a tenth of its speed here, and would take a core from training for longer.

Written by ``hpcgpt.checkpoint.save``, loaded by ``hpcgpt.checkpoint.load``, removed by ``hpcgpt.checkpoint.retention``.
No torch in here.
"""

from __future__ import annotations

import errno
import json
import math
import re
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import xxhash
from safetensors import SafetensorError, safe_open

from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.storage.lease import Lease

FORMAT, VERSION = "hpcgpt-checkpoint", 2
JSON_LIMIT = 64 << 20  # bytes; what is larger is no state.json or manifest.json of ours
_NAME = re.compile(r"step_(\d{9,})")
_PIECE = re.compile(r"(.*)\[(\d{1,18}):(\d{1,18})\]", re.ASCII)
_FILE = re.compile(r"(tensors_\d{5}_of_\d{5}\.safetensors|state\.json)")
# A file is not there. Any other error may be this host's or the network's, and is no damage.
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


@dataclass
class TrainState:
    """Where training stands. Each field is one of `State`, too.

    `pending` is the metrics row of this step, if the run was stopped before its evaluation had ended; `val_loss` in
    nats, if this very step was evaluated. `skipped` global batches were left out so far, in `rollbacks`: step s uses
    global batch s + skipped.
    """

    step: int = 0
    pending: dict[str, Any] | None = None
    val_loss: float | None = None
    skipped: int = 0
    rollbacks: int = 0

    def become(self, saved: State) -> None:
        """Take over what a checkpoint says."""
        for item in fields(self):
            setattr(self, item.name, getattr(saved, item.name))


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside its tensors. For `pending`, `val_loss`, `skipped` and `rollbacks` see TrainState.

    `identity` is what must not change between attempts. `in_effect` is what the attempt that saved it computed with:
    see ``hpcgpt.training.in_effect``; older checkpoints do not say.
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
    """A checkpoint of another format version: whole perhaps, so not to be set aside."""


# --- names -----------------------------------------------------------------------------------------


def path_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:09d}"


def temporary_of(final: Path, generation: int) -> Path:
    return final.with_name(f".{final.name}.g{generation:04d}.tmp")


def share_name(rank: int, world_size: int) -> str:
    return f"tensors_{rank:05d}_of_{world_size:05d}.safetensors"


def found(checkpoints: Path) -> list[Path]:
    """Checkpoints by name, the newest first; valid or not.

    Raises:
        OSError: the folder is there, and cannot be read.
    """
    return sorted((path for path in entries(checkpoints) if _NAME.fullmatch(path.name)), key=step_of, reverse=True)


def entries(folder: Path) -> list[Path]:
    """What is in a folder. Unlike glob, which takes one that cannot be read for an empty one."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def rows_of(name: str) -> tuple[str, range | None]:
    """A tensor's name without its rows, and those; None: all."""
    found = _PIECE.fullmatch(name)
    return (found[1], range(int(found[2]), int(found[3]))) if found else (name, None)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


# --- writing and reading the small files -----------------------------------------------------------


def state_bytes(state: State) -> bytes:
    return json.dumps(asdict(state)).encode()


def manifest_bytes(files: dict[str, Any], generation: int) -> bytes:
    """`files`: name -> {"bytes": int, "xxh3": hex}."""
    manifest = {"format": FORMAT, "version": VERSION, "generation": generation, "files": files}
    return json.dumps(manifest | {"digest": _digest(manifest)}, indent=1).encode()


def read_state(checkpoint: Path) -> State:
    """Raises ValueError, TypeError or OSError if it is none; see `verify` first."""
    return State(**_json(checkpoint / "state.json"))


def val_loss(checkpoint: Path) -> float | None:
    """In nats, if this very step was evaluated. Raises as `read_state`.

    If the evaluation was interrupted, the loss is in the run's metrics.jsonl, written by the next attempt.
    """
    state = read_state(checkpoint)
    if state.pending is None:
        return state.val_loss
    begin = f'{{"step": {state.step}, '.encode()  # not all of them are parsed: there may be a million
    try:
        with open(checkpoint.parents[1] / "metrics.jsonl", "rb") as file:
            row = json.loads(next((line for line in file if line.startswith(begin)), b"{}"))
    except (FileNotFoundError, RecursionError, ValueError):  # not yet there, half written, or no row of ours
        return None
    loss = row.get("val/loss")
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
    """What is wrong with a checkpoint; '' if it is whole.

    Raises:
        FormatError: it is of another format version.
        OSError: a file that is there cannot be read.
    """
    problem = check_structure(checkpoint)
    return problem or check_checksums(checkpoint, read_files(checkpoint))


def check_structure(checkpoint: Path) -> str:
    """What is wrong with all but the checksums of the files: manifest, names, sizes, state.

    Raises:
        FormatError: it is of another format version.
        OSError: a file that is there cannot be read.
    """
    try:
        manifest = _json(checkpoint / "manifest.json")
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, expected {FORMAT}"
        if type(manifest["version"]) is not int:
            return f"its manifest cannot be read: version {manifest['version']!r}"
        digest = manifest.pop("digest", None)
        if manifest["version"] != VERSION and digest in (_digest(manifest), None):
            raise FormatError(
                f"{checkpoint} has format version {manifest['version']}, and this program knows {VERSION}: use the "
                "hpcgpt that wrote it, or start another --run.name"
            )
        if digest != _digest(manifest):
            return "its manifest's own checksum does not hold"
        files = manifest["files"]
        if not all(_FILE.fullmatch(name) for name in files) or "state.json" not in files:
            return f"its manifest names {', '.join(repr(name[:80]) for name in sorted(files)[:3])}"
        for name, expected in files.items():
            path = checkpoint / name
            if problem := _not_a_file(path):
                return problem
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
        state = read_state(checkpoint)
        if checkpoint.name != f"step_{state.step:09d}":
            return f"it holds step {state.step}"
        shares = [share_name(rank, state.world_size) for rank in range(min(state.world_size, len(files)))]
        if set(shares) != set(files) - {"state.json"}:
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


def check_checksums(checkpoint: Path, names: Iterable[str]) -> str:
    """Name the first of the files `names` that differs from the manifest, after `check_structure`; '' if none does.

    Raises:
        OSError: it cannot be read, which may be this host's fault and no damage.
    """
    files = read_files(checkpoint)
    for name in names:
        with open(checkpoint / name, "rb") as file:
            if _checksum(file) != files[name].get("xxh3"):
                return f"the checksum of {name} is not the one in the manifest"
        if name.endswith(".safetensors"):
            try:
                with safe_open(checkpoint / name, framework="np"):  # reads the header
                    pass
            except SafetensorError as error:
                return f"{name}: {error}"
            except MemoryError as error:  # no room for another map: of the host, and no damage
                raise OSError(errno.ENOMEM, f"{checkpoint / name}: {error}") from None
    return ""


def _checksum(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while piece := file.read(8 << 20):
        digest.update(piece)
    return str(digest.hexdigest())


def quarantine(checkpoint: Path, problem: str, lease: Lease) -> None:
    """Take a damaged checkpoint out of the way, with a loud line; nothing of it is lost."""
    name, count = f"damaged_{checkpoint.name}.g{lease.number:04d}", 1
    aside = checkpoint.with_name(name)
    while aside.is_symlink() or aside.exists():  # the same step, saved again and damaged again
        count += 1
        aside = checkpoint.with_name(f"{name}.{count}")
    checkpoint.rename(aside)
    lease.check()  # if it was not ours to move, it stays without a reason, and is put back: see retention
    # On a full disk the warning below has to do; and what a link points to is not ours to write into.
    with suppress(OSError):
        if not aside.is_symlink():
            (aside / "REASON.txt").write_text(problem + "\n")
    warn(checkpoint, f"{problem}; set aside as {aside.name}")


def warn(checkpoint: Path, problem: str) -> None:
    streams.warn(f"checkpoint {checkpoint} is damaged: {problem}")


def _not_a_file(path: Path) -> str:
    """Also a pipe or a device, which could be waited for without end."""
    mode = path.lstat().st_mode
    return "" if stat.S_ISREG(mode) else f"{path.name} is no regular file"


def damaged(checkpoints: Path) -> list[Path]:
    """Those that were set aside."""
    return sorted(path for path in entries(checkpoints) if path.name.startswith("damaged_step_"))
