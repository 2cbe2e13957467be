"""A run that begins with another one's weights: ``run.init_from`` names it (hpcgpt.run.which_runs), ``run.init_step``
the checkpoint, by default the newest valid one.

Step, schedule and random generators start from the beginning: the new run may have another learning rate, another
length, another batch, other data (with the same tokenizer). ``run.init_optimizer`` takes the optimizer's state as well.
With ``run.init_data = "continue"`` the samples continue after those that the other run has trained on, so that a fork
at step k with both, and at the same constant rate, computes what the other run did after step k.

The first attempt records the checkpoint that it begins with (the event ``init_from``), and later ones begin with the
same: the other run may have newer ones by then, and an interruption must not change the result. Once the new run has a
checkpoint of its own, the other one is not read any more.

Only `load` imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt.checkpoint import go_back, layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Config, Run
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder, which_runs
from hpcgpt.run.run_folder import IMPORTED
from hpcgpt.tokenizer import save_load

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hpcgpt.distributed.world import Ranks

# Options of the model that change neither names nor shapes of weights.
_FREE = ("dropout", "init_std")
# Keys of Plan.identity that decide which tokens a sample has. The batch does not: samples are counted, not batches.
_ORDER = ("run.seed", "data.stride", "digest of the shards")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run begins with."""

    path: Path
    state: State
    with_optimizer: bool

    def message(self, first_sample: int) -> str:
        """Say where the first weights come from. `first_sample`: the one that training begins with."""
        optimizer = ", with its optimizer" if self.with_optimizer else ""
        samples = f"; samples from {first_sample:,} on" if first_sample else ""
        return f"first weights from {self.path}, step {self.state.step:,}{optimizer}{samples}"


def resolved(config: Config) -> Config:
    """Return the configuration with the folder of the run that `run.init_from` names.

    A run with checkpoints of its own does not look for that folder, which may be gone or hang by now: the folder is the
    one that its config.toml names.

    Raises:
        UserError: there is no such run.
        OSError: the machine cannot read the folder.
    """
    if not config.run.init_from:
        return config
    if _is_needed(config):
        try:
            folder = str(which_runs.exact(config.run.init_from, Path(config.run.dir)))
        except UserError as error:
            raise UserError(f"run.init_from: {error}") from None
    else:
        folder = _recorded(config) or config.run.init_from
    return dataclasses.replace(config, run=dataclasses.replace(config.run, init_from=folder))


def _recorded(config: Config) -> str:
    """Return the run.init_from of the attempts before; '' if they had none, or config.toml cannot be read."""
    try:
        return sources.from_file(config.run_folder / "config.toml").run.init_from
    except (UserError, OSError):
        return ""


def first_step(config: Config) -> int:
    """Return the step of the other run's checkpoint to begin with; 0: the newest.

    It is run.init_step, else what the attempts before began with, if they made a step.

    Raises:
        OSError: the events of this run cannot be read.
    """
    if config.run.init_step:
        return config.run.init_step
    source, events = paths.absolute(config.run.init_from), run_folder.events(config.run_folder)
    # Their rows are gone if a later one was ended before its first step.
    had_rows = any(event.get("event") == "start" and event.get("lost_steps") for event in events)
    if not had_rows and not run_folder.has_trained(config.run_folder):
        return 0
    for event in reversed(events):
        if event.get("event") == "init_from" and event.get("from_run") == source:
            step = event.get("from_step")
            return step if type(step) is int else 0
    return 0


def _check_is_kept(source: Path, step: int) -> None:
    steps = sorted(layout.step_of(path) for path in layout.found(source / "checkpoints"))
    if step not in steps:
        there = ", ".join(f"{one:,}" for one in steps)
        raise UserError(
            f"run.init_from {source}: this run began with its checkpoint of step {step:,} and has none of its own yet; "
            f"that one is gone, there are those of steps {there}. From another one the result would be another: choose "
            "it with --run.init_step, and next time a step that checkpoint.keep_every keeps"
        )


def check(config: Config, fingerprint: str) -> None:
    """Check that `run.init_from`, `resolved`, fits this run, whose tokenizer has this fingerprint. Without torch.

    Raises:
        UserError: it has no checkpoint, or another model or tokenizer.
    """
    if (config.run_folder / IMPORTED).exists():
        raise UserError(
            f"{config.run_folder} holds imported weights, and no run trains there: give the run another --run.name, "
            f"and --run.init_from {config.run_folder}"
        )
    source = Path(config.run.init_from)
    if not _is_needed(config):
        return
    if source.resolve() == config.run_folder.resolve():
        raise UserError(f"run.init_from {source} is this run itself")
    try:
        other_config = sources.from_file(source / "config.toml")
        save_load.load(source / "tokenizer", fingerprint)
    except ValueError as error:
        raise UserError(f"run.init_from: {error}") from None
    if not layout.found(source / "checkpoints"):
        raise UserError(f"run.init_from {source} has no checkpoint yet")
    if config.run.init_step:
        go_back.find(source, config.run.init_step, "run.init_step")
    elif step := first_step(config):
        _check_is_kept(source, step)
    other = other_config.model
    # No weight of a model with rotary positions depends on the length of its context.
    free = (*_FREE, "block_size") if config.model.kind == "modern" else _FREE
    different = [
        f"model.{item.name} is {getattr(other, item.name)!r} there and {getattr(config.model, item.name)!r} here"
        for item in dataclasses.fields(other)
        if item.name not in free and getattr(other, item.name) != getattr(config.model, item.name)
    ]
    if different:
        raise UserError(f"run.init_from {source} has another model: {'; '.join(different)}")
    if (source / IMPORTED).exists() and (config.run.init_optimizer or config.run.init_data != "start"):
        key = "init_optimizer" if config.run.init_optimizer else "init_data"
        raise UserError(f"run.{key}: {source} holds imported weights, without optimizer and samples: leave it out")
    if config.run.init_optimizer and other_config.optim.name != config.optim.name:
        raise UserError(
            f"run.init_optimizer: optim.name is {other_config.optim.name} in {source} and {config.optim.name} here: "
            "use the same, or leave run.init_optimizer out"
        )


def check_samples(config: Config, identity: dict[str, Any]) -> None:
    """Check that a run with this `identity` (Plan.identity) can continue with the samples of run.init_from.

    Raises:
        UserError: it has other samples.
    """
    if not _is_needed(config) or config.run.init_data == "start":
        return
    checkpoints = Path(config.run.init_from) / "checkpoints"
    step = first_step(config)
    path = layout.path_of(checkpoints, step) if step else layout.found(checkpoints)[0]
    try:
        state = layout.read_state(path)
    except (OSError, TypeError, ValueError):  # a damaged one: `load` reports it, and may use an older one
        return
    first_batch(state, config, identity)


def _is_needed(config: Config) -> bool:
    """Return whether a run begins with another one's weights: it is to, and has no checkpoint of its own yet."""
    return bool(config.run.init_from) and not layout.found(config.run_folder / "checkpoints")


def not_read(settings: Run) -> str:
    """Say that `run.init_from` has no effect on a run that has checkpoints; '' if it is not set."""
    source = settings.init_from
    return f"run.init_from {source} is not read: this run has checkpoints of its own" if source else ""


def first_batch(other: State, config: Config, identity: dict[str, Any]) -> int:
    """Return the number of the global batch that a new run with this `identity` (Plan.identity) begins with.

    With run.init_data = "continue", that is the first whose samples the run in state `other` has not used. If the batch
    has another size, less than a batch of samples may be left out.

    Raises:
        UserError: the runs do not have the same samples.
    """
    if config.run.init_data == "start":
        return 0
    shares = {key for key in other.identity.keys() | identity.keys() if key.startswith("share in ")}
    for key in (*_ORDER, *sorted(shares)):
        if other.identity.get(key) != identity.get(key):
            raise UserError(
                f'run.init_data "continue" needs the samples of {config.run.init_from}, whose {key} is '
                f"{other.identity.get(key)!r} and here is {identity.get(key)!r}: restore that, or use "
                "--run.init_data start"
            )
    used = (other.step + other.skipped) * int(other.identity["train.global_batch"])
    return -(-used // config.train.global_batch)


def load(config: Config, model: nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> Origin:
    """Load the weights of `model`, and the state of `optimizer` unless it is None. A collective.

    Raises:
        UserError: there is no valid checkpoint, or it has another model or optimizer.
    """
    from hpcgpt.checkpoint import load as checkpoint_load
    from hpcgpt.distributed.collectives import run_on_rank0

    source = Path(config.run.init_from)
    step = run_on_rank0(ranks, lambda: first_step(config))  # from a file that other nodes may not see yet
    found = checkpoint_load.newest_valid(source / "checkpoints", ranks, None, lambda one: step in (0, one))
    if found is None:
        raise UserError(f"run.init_from {source} has no checkpoint {f'of step {step:,}' if step else 'yet'}")
    return Origin(found, checkpoint_load.load(found, model, optimizer, ranks), optimizer is not None)
