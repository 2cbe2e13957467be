"""Loads a trained model from a run folder, for ``hpcgpt sample`` and ``hpcgpt eval``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from hpcgpt.checkpoint import layout, run_config
from hpcgpt.checkpoint import load as checkpoint_load
from hpcgpt.checkpoint.layout import State
from hpcgpt.config.options import Config
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.collectives import run_on_rank0
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.errors import UserError
from hpcgpt.model import host_memory, kernels
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.precision import allow_tf32, computing_in, pick_dtype
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.interface import Tokenizer

ALONE = World(0, 0, 1, 1, "alone", "command")


@dataclass(frozen=True)
class Trained:
    """A model with the weights of the checkpoint `path`, on `ranks.device`; each of `ranks` has all of it."""

    config: Config
    path: Path
    state: State
    model: GPT
    tokenizer: Tokenizer
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that training computes in, or would on this device."""
        return pick_dtype(self.config.train.dtype, self.ranks.device)

    def computing(self) -> torch.autocast:
        """Return a context that computes in `dtype`. Enter it once: weights are cast each time."""
        return computing_in(self.dtype, self.ranks.device)

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Also use the attention kernel of training, so that losses are the same to the last bit.

        Only for windows like those of training: some kernels cannot process a single token.
        """
        with self.computing(), self._attention()():
            yield

    def _attention(self) -> kernels.Context:
        try:
            return kernels.attention(self.config.train.attention, self.ranks.device, self.dtype)
        except ValueError:  # trained on GPUs, loaded where there are none
            return nullcontext


def load(folder: Path, step: int | None, best: bool, device_name: str = "", here: World = ALONE) -> Trained:
    """Load the model of a run from the checkpoint of a step, from the best one, or else from the newest.

    `device_name`: auto, cpu or cuda; "": that of the run, or the CPU where there is no GPU. `here`: this rank of
    several that load the same model; then this is a collective.

    Raises:
        UserError: there is no such run or checkpoint, or the one of `step` is damaged. Other damaged ones are skipped.
            There is no such device.
    """
    config = run_config.config(folder)
    torch.set_num_threads(config.run.threads or world.cores(here))
    # A run on GPUs may be loaded where there are none.
    device = world.pick_device(here, device_name or ("cpu" if config.run.device == "cpu" else "auto"))
    if device.type == "cpu":
        host_memory.keep_freed()
    allow_tf32(device)
    # What the ranks send each other here are Python objects, never tensors on a GPU.
    ranks = rendezvous.connect(here, device, folder, "gloo", config.run.rendezvous_timeout_s)
    path = choose(folder, step, best, ranks)
    tokenizer = save_load.load(folder / "tokenizer")
    model = GPT(config.model, options=ForwardOptions.from_config(config, tokenizer.end_of_text)).to(ranks.device)
    if config.train.dtype == "float64":
        model.double()
    return Trained(config, path, checkpoint_load.load(path, model, None, ranks), model.eval(), tokenizer, ranks)


def choose(folder: Path, step: int | None, best: bool, ranks: Ranks) -> Path:
    """Return the checkpoint of a step, the best one, or else the newest, after a check of every byte; see `load`.

    A collective: all ranks get the same.
    """
    if not best and step is None:
        return _newest(folder, ranks)
    return _best(folder, ranks) if step is None else _of_step(folder, step, ranks)


def _newest(folder: Path, ranks: Ranks) -> Path:
    newest = checkpoint_load.newest_valid(folder / "checkpoints", ranks, None)
    if newest is None:
        raise UserError(f"{folder} has no checkpoint yet")
    return newest


def _of_step(folder: Path, step: int, ranks: Ranks) -> Path:
    path = run_on_rank0(ranks, lambda: _find(folder, step))
    if problem := checkpoint_load.problem_of(path, ranks):
        raise UserError(f"{path} is damaged: {problem}")
    return path


def _find(folder: Path, step: int) -> Path:
    by_step = {layout.step_of(path): path for path in reversed(layout.found(folder / "checkpoints"))}
    if step not in by_step:
        steps = f"there are {', '.join(f'{found:,}' for found in by_step)}" if by_step else "there is none yet"
        raise UserError(f"{folder} has no checkpoint of step {step:,}: {steps}")
    return by_step[step]


def _best(folder: Path, ranks: Ranks) -> Path:
    """Return the best checkpoint; see layout.best. Warn about better ones that are damaged."""
    damaged: list[Path] = []
    while True:
        # One rank looks: the run may be training, and another may find another best one, or one that is being removed.
        best = run_on_rank0(ranks, lambda: _best_but(folder, damaged))
        problem = checkpoint_load.problem_of(best, ranks)
        if not problem:
            return best
        if ranks.world.is_first:
            layout.warn(best, problem)
        damaged.append(best)


def _best_but(folder: Path, damaged: list[Path]) -> Path:
    """Return the best checkpoint that is not `damaged`."""

    def loss_of(path: Path) -> float | None:
        return None if path in damaged or layout.check_structure(path) else layout.val_loss(path)

    best = layout.best(layout.found(folder / "checkpoints"), loss_of, lambda _: True)
    if best is None:
        raise UserError(
            f"{folder} has no checkpoint of a step that was evaluated, so none is the best: there is one where "
            "eval.every and checkpoint.every fall on the same step, and at the end"
        )
    return best
