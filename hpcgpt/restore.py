"""Going on from a checkpoint: the newest valid one is chosen by all ranks together, and loaded by each.

Rank 0 looks what there is and whether it fits together; the checksums are shared out over the ranks. What is
damaged is set aside, and the one before is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hpcgpt import checkpoint
from hpcgpt.checkpoint import State
from hpcgpt.generation import Generation
from hpcgpt.optim import STATE
from hpcgpt.together import on_all, on_first
from hpcgpt.world import Ranks


def newest_valid(
    checkpoints: Path, ranks: Ranks, held: Generation | None, wanted: Callable[[int], bool] = lambda _: True
) -> Path | None:
    """The newest valid checkpoint of a step that is `wanted`, the same on every rank; None if there never was one. A
    collective.

    Damaged ones are set aside with a loud line; by a reader, who holds no generation, they are only passed over.

    Raises:
        ValueError: there are checkpoints, and none is valid; or the newest is of another format version.
        OSError: a rank cannot read what rank 0 sees.
    """
    problems = []
    for name in on_first(ranks, lambda: [path.name for path in checkpoint.found(checkpoints)]):
        path = checkpoints / name
        if not wanted(checkpoint.step_of(path)):
            continue
        problem = _problem(path, ranks)
        if not problem:
            return path
        problems.append(f"{name}: {problem}")
        on_first(ranks, lambda path=path, problem=problem: _tell(path, problem, held))  # type: ignore[misc]
    # Also those that earlier starts set aside: there was training, and it must not silently begin anew.
    earlier = on_first(ranks, lambda: [path.name for path in checkpoint.damaged(checkpoints)])
    if problems := problems or earlier:
        raise ValueError(
            f"{checkpoints} has checkpoints, but none is valid ({'; '.join(problems)}): bring one back, or start "
            "another --run.name; training is not started over silently"
        )
    return None


def _problem(path: Path, ranks: Ranks) -> str:
    """What is wrong with a checkpoint, '' if it is whole; the same on every rank."""
    if problem := on_first(ranks, lambda: checkpoint.outline(path)):
        return problem

    def mine() -> str:
        names = sorted(checkpoint.read_files(path))
        return checkpoint.damage(path, names[ranks.world.rank :: ranks.world.size])

    return next((problem for problem in on_all(ranks, mine) if problem), "")


def _tell(path: Path, problem: str, held: Generation | None) -> None:
    if held is not None:
        checkpoint.set_aside(path, problem, held)
    else:
        checkpoint.warn(path, problem)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> State:
    """Fill model, optimizer (None: leave it out) and this rank's random generators; returns the rest.

    On another world size than the checkpoint's the generators are left as they are.

    Raises:
        ValueError: the tensors are not those of this model, this optimizer, or this precision.
    """
    state = checkpoint.read_state(path)
    parameters = dict(model.named_parameters())
    generators = [f"rng/{ranks.world.rank}/{kind}" for kind in ("cpu", "cuda")]
    if state.world_size != ranks.world.size:
        generators = []
    seen: set[str] = set()
    for name, value in _tensors(path, state):
        if name in seen:
            raise ValueError(f"{path} has the tensor {name} twice")
        seen.add(name)
        kind, _, rest = name.partition("/")
        if kind == "model":
            _fill(_named(parameters, rest), rest, value(), exactly=optimizer is not None)
        elif kind == "optim" and optimizer is not None:
            parameter, _, key = rest.rpartition("/")
            owner = _named(parameters, parameter)
            optimizer.state[owner][key] = _checked(name, value(), owner).to(owner.device)
        elif name in generators and optimizer is not None:
            _restore_generator(name, value(), ranks)
        elif kind not in ("model", "optim", "rng"):
            raise ValueError(f"{path} has a tensor {name}, which is nothing that this program knows")
    _check_complete(path, seen, parameters, optimizer, ranks, state)
    return state


def _tensors(path: Path, state: State) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The name of each tensor of a checkpoint, and a way to read it."""
    for rank in range(state.world_size):
        share = path / checkpoint.share_name(rank, state.world_size)
        try:
            with safe_open(share, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, partial(_read, share, file, name)
        except SafetensorError as error:
            raise ValueError(f"{share}: {error}") from None


def _read(share: Path, file: Any, name: str) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(name)
    except (SafetensorError, AttributeError, TypeError) as error:  # a dtype that this torch does not have
        raise ValueError(f"{share}: {name} cannot be read: {error}") from None
    return tensor


def _check_complete(
    path: Path,
    seen: set[str],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    ranks: Ranks,
    state: State,
) -> None:
    """A tensor that is not there must not leave its place at what it was by chance."""
    expected = {f"model/{name}" for name in parameters}
    if optimizer is not None:
        if state.step or any(name.startswith("optim/") for name in seen):
            expected |= {f"optim/{name}/{key}" for name in parameters for key in STATE}
        if state.world_size == ranks.world.size:
            expected.add(f"rng/{ranks.world.rank}/cpu")
    if missing := sorted(expected - seen):
        raise ValueError(f"{path} lacks {', '.join(missing[:3])} of this model")


def _named(parameters: dict[str, nn.Parameter], name: str) -> nn.Parameter:
    if name not in parameters:
        raise ValueError(f"the checkpoint has a tensor {name}, and the model has none of that name")
    return parameters[name]


def _checked(name: str, value: Tensor, owner: nn.Parameter) -> Tensor:
    """A tensor of the optimizer's state, which no later check would look at."""
    key = name.rpartition("/")[2]
    if key not in STATE:
        raise ValueError(f"{name} is nothing that the optimizer keeps: {', '.join(STATE)}")
    shape, dtype = ((), torch.float32) if key == "step" else (tuple(owner.shape), owner.dtype)
    if tuple(value.shape) != shape or value.dtype != dtype:
        raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)} in the checkpoint, expected {dtype} {shape}")
    return value


def _fill(target: nn.Parameter, name: str, value: Tensor, exactly: bool) -> None:
    if target.shape != value.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} in the checkpoint and {tuple(target.shape)} in the model")
    if target.dtype != value.dtype and (exactly or not value.is_floating_point()):
        raise ValueError(
            f"{name} is {value.dtype} in the checkpoint and {target.dtype} in the model: set train.dtype as it was"
        )
    with torch.no_grad():
        target.copy_(value)


def _restore_generator(name: str, state: Tensor, ranks: Ranks) -> None:
    try:
        if name.endswith("/cpu"):
            torch.set_rng_state(state)
        elif ranks.device.type == "cuda":
            torch.cuda.set_rng_state(state, ranks.device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} is no state of a random generator: {error}") from None
