"""The on-disk form of a run's state: save, verify, choose the newest valid one, retain.

::

    checkpoints/
      step_000001000/
        tensors_00000_of_00004.safetensors    a share of all tensors from each rank
        ...
        state.json                            see State
        manifest.json                         bytes and SHA-256 of the files above; written last
      .step_000002000.g0003.tmp/              being written by generation 3
      damaged_step_000000500.g0003/           set aside by generation 3, with the reason in REASON.txt

The tensors, spread over the ranks by size: ``model/<parameter>``, ``optim/<parameter>/<state>``, and
``rng/<rank>/cpu`` (and ``/cuda``), the state of each rank's random generators as bytes.

A checkpoint is written under a temporary name that holds the writer's generation. Files are flushed to the
disk, then the folder; then it gets its name, and the folder above is flushed. A folder without its
manifest does not exist as far as loading is concerned. safetensors and JSON only: nothing in a
checkpoint can run code.

Ranks share the outcome of every stage before the next one, so a full disk on one of them costs all of
them this checkpoint, and nobody waits for somebody who has left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hpcgpt import durable
from hpcgpt.generation import Generation
from hpcgpt.together import on_all, on_first
from hpcgpt.world import Ranks

FORMAT, VERSION = "hpcgpt-checkpoint", 1
_NAME = re.compile(r"step_(\d{9,})")
_FILE = re.compile(r"(tensors_\d{5}_of_\d{5}\.safetensors|state\.json)")


@dataclass(frozen=True)
class State:
    """Where a run stands, beside its tensors.

    `identity` is what must not change between attempts; `pending` is the metrics row of this step, if the
    run was stopped before its evaluation had ended.
    """

    step: int
    tokens: int
    samples: int
    world_size: int
    identity: dict[str, Any]
    pending: dict[str, Any] | None = None
    format: str = field(default=FORMAT)
    version: int = field(default=VERSION)


# --- saving ----------------------------------------------------------------------------------------


def save(
    checkpoints: Path,
    state: State,
    tensors: dict[str, Tensor],
    ranks: Ranks,
    generation: Generation | None,
) -> str:
    """Write one checkpoint together; '' if it is there now, else why it is not, on every rank alike.

    A collective: every rank calls it, with the same `tensors` but for its own ``rng/``. `generation` is
    rank 0's; the others pass None.
    """
    final = checkpoints / f"step_{state.step:09d}"
    try:
        temporary = on_first(ranks, lambda: _begin(final, generation))
        if temporary is None:
            return ""  # it is there already
        share = _share(tensors, ranks)
        files = on_all(ranks, lambda: _write_share(Path(temporary), share, ranks))
        on_first(ranks, lambda: _commit(Path(temporary), final, state, dict(files), generation))
    except OSError as error:
        # Nobody writes any more: the error was shared. What is half written is ours, and useless.
        if ranks.world.is_first and generation is not None:
            shutil.rmtree(_temporary(final, generation), ignore_errors=True)
        return str(error)
    return ""


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name. They are the live ones: not copied."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"model/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            found[f"optim/{name}/{key}"] = value
    rank = ranks.world.rank
    found[f"rng/{rank}/cpu"] = torch.get_rng_state()
    if ranks.device.type == "cuda":
        found[f"rng/{rank}/cuda"] = torch.cuda.get_rng_state(ranks.device)
    return found


def retain(checkpoints: Path, keep_last: int) -> list[Path]:
    """Remove all but the `keep_last` newest checkpoints; returns those that went."""
    old = _found(checkpoints)[keep_last:]
    for path in old:
        # Out of sight first: a removal that is cut short must not leave a checkpoint without its files.
        hidden = path.with_name(f".{path.name}.removed")
        path.rename(hidden)
        shutil.rmtree(hidden)
    return old


def clean(checkpoints: Path, generation: Generation) -> None:
    """Remove what earlier generations left half written or half removed."""
    for path in checkpoints.glob(".step_*"):
        found = re.fullmatch(r"\.step_\d+\.(g(?P<generation>\d+)\.tmp|removed)", path.name)
        if found and int(found["generation"] or 0) < generation.number:
            # An orphan may still write into it, and NFS keeps open files under other names.
            shutil.rmtree(path, ignore_errors=True)


def _begin(final: Path, generation: Generation | None) -> str | None:
    if final.exists():
        return None
    assert generation is not None
    temporary = _temporary(final, generation)
    try:
        temporary.mkdir()
    except OSError as error:
        raise durable.explained(error, temporary) from error
    return str(temporary)


def _temporary(final: Path, generation: Generation) -> Path:
    return final.with_name(f".{final.name}.g{generation.number:04d}.tmp")


def _share(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The tensors that this rank writes: largest first, each to the rank with the least so far."""
    sizes = [0] * ranks.world.size
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith("rng/")}
    common = [(t.numel() * t.element_size(), name) for name, t in tensors.items() if name not in mine]
    for size, name in sorted(common, key=lambda row: (-row[0], row[1])):
        rank = sizes.index(min(sizes))
        sizes[rank] += size
        if rank == ranks.world.rank:
            mine[name] = tensors[name]
    return mine


def _write_share(temporary: Path, share: dict[str, Tensor], ranks: Ranks) -> tuple[str, dict[str, Any]]:
    path = temporary / f"tensors_{ranks.world.rank:05d}_of_{ranks.world.size:05d}.safetensors"
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in share.items()}, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        # It hides the operating system's error number in its text.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else 5
        raise durable.explained(OSError(code, os.strerror(code)), path) from error
    return path.name, _fingerprint(path)


def _commit(temporary: Path, final: Path, state: State, files: dict[str, Any], generation: Generation | None) -> None:
    assert generation is not None
    durable.write(temporary / "state.json", json.dumps(asdict(state)).encode())
    files["state.json"] = _fingerprint(temporary / "state.json")
    manifest = {"format": FORMAT, "version": VERSION, "generation": generation.number, "files": files}
    durable.write(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
    generation.check()
    try:
        temporary.rename(final)
    except OSError as error:
        raise durable.explained(error, final) from error
    durable.sync_folder(final.parent)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- choosing and loading --------------------------------------------------------------------------


def newest_valid(checkpoints: Path, ranks: Ranks, generation: Generation | None) -> Path | None:
    """The newest valid checkpoint, chosen by rank 0 for all; None if there never was one.

    Damaged ones are set aside with a loud line. A collective.

    Raises:
        ValueError: there are checkpoints, and none is valid; or the newest is of a later format.
    """
    chosen = on_first(ranks, lambda: _choose(checkpoints, generation))
    return Path(chosen) if chosen else None


def read_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / "state.json").read_bytes()))


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> State:
    """Fill model, optimizer (None: leave it out) and this rank's random generators; returns the rest.

    On another world size than the checkpoint's the generators are left as they are.

    Raises:
        ValueError: the tensors are not those of this model.
    """
    state = read_state(checkpoint)
    parameters = dict(model.named_parameters())
    rng = f"rng/{ranks.world.rank}/" if state.world_size == ranks.world.size else None
    missing = set(parameters)
    for path in sorted(checkpoint.glob("tensors_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                kind, _, rest = name.partition("/")
                if kind == "model":
                    _fill(parameters, rest, file.get_tensor(name))
                    missing.discard(rest)
                elif kind == "optim" and optimizer is not None:
                    parameter, _, key = rest.rpartition("/")
                    owner = _named(parameters, parameter)
                    optimizer.state[owner][key] = file.get_tensor(name).to(owner.device)
                elif rng and name.startswith(rng) and optimizer is not None:
                    _restore_generator(name, file.get_tensor(name), ranks)
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(sorted(missing)[:3])} of this model")
    return state


def verify(checkpoint: Path) -> str:
    """What is wrong with a checkpoint; '' if it is whole: manifest, sizes, checksums, state.

    Raises:
        ValueError: it is of a later format than this program knows: not damage, so not to be set aside.
    """
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, expected {FORMAT}"
        if manifest["version"] > VERSION:
            raise FutureFormatError(
                f"{checkpoint} has format version {manifest['version']}, and this program knows {VERSION}: use a "
                "newer hpcgpt"
            )
        names = set(manifest["files"])
        if not all(_FILE.fullmatch(name) for name in names) or "state.json" not in names:
            return f"its manifest names {', '.join(sorted(names)[:3])}"
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
            if _fingerprint(path) != expected:
                return f"the SHA-256 of {name} is not the one in the manifest"
        state = read_state(checkpoint)
        shares = {f"tensors_{r:05d}_of_{state.world_size:05d}.safetensors" for r in range(state.world_size)}
        if names != shares | {"state.json"}:
            return f"it lacks {', '.join(sorted(shares - names)[:3])}"
        if checkpoint.name != f"step_{state.step:09d}":
            return f"it holds step {state.step}"
        for name in sorted(shares):
            with safe_open(checkpoint / name, framework="pt"):  # reads the header
                pass
    except FutureFormatError:
        raise
    except OSError as error:
        return f"{Path(error.filename or '').name}: {error.strerror}"
    except SafetensorError as error:
        return f"{name}: {error}"
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return f"its manifest or state cannot be read: {error!r}"
    return ""


class FutureFormatError(ValueError):
    """A checkpoint of a later format version."""


def _found(checkpoints: Path) -> list[Path]:
    """Checkpoints by name, the newest first; valid or not."""
    paths = [path for path in checkpoints.glob("step_*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def _choose(checkpoints: Path, generation: Generation | None) -> str | None:
    candidates = _found(checkpoints)
    problems = []
    for path in candidates:
        problem = verify(path)
        if not problem:
            return str(path)
        problems.append(f"{path.name}: {problem}")
        if generation is not None:
            aside = path.with_name(f"damaged_{path.name}.g{generation.number:04d}")
            path.rename(aside)
            with suppress(OSError):  # on a full disk the warning below has to do
                (aside / "REASON.txt").write_text(problem + "\n")
            problem += f"; set aside as {aside.name}"
        print(f"warning: checkpoint {path} is damaged: {problem}", file=sys.stderr, flush=True)
    # Also those that earlier starts set aside: there was training, and it must not silently begin anew.
    problems = problems or [path.name for path in checkpoints.glob("damaged_step_*")]
    if problems:
        raise ValueError(
            f"{checkpoints} has checkpoints, but none is valid ({'; '.join(problems)}): bring one back, or start "
            "another --run.name; training is not started over silently"
        )
    return None


def _named(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise ValueError(f"the checkpoint has a tensor {name}, and the model has none of that name")
    return parameters[name]


def _fill(parameters: dict[str, nn.Parameter], name: str, value: Tensor) -> None:
    target = _named(parameters, name)
    if target.shape != value.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(target.shape)} in the model")
    with torch.no_grad():
        target.copy_(value)


def _restore_generator(name: str, state: Tensor, ranks: Ranks) -> None:
    if name.endswith("/cpu"):
        torch.set_rng_state(state)
    elif ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state, ranks.device)
