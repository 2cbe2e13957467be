"""Initial weights from another run: ``run.init_from`` names its folder, and its newest valid checkpoint is taken.

Only the weights are loaded. Optimizer, schedule, samples and step start from the beginning: the new run may have other
data (with the same tokenizer), another learning rate, another length. Once it has a checkpoint of its own, the other
run is not read any more.

Only `load` imports torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hpcgpt.checkpoint import layout
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.tokenizer import save_load

if TYPE_CHECKING:
    from torch import nn

    from hpcgpt.distributed.world import Ranks

# Options of the model that change neither names nor shapes of weights.
_FREE = ("dropout", "init_std")


def check(config: Config, fingerprint: str) -> None:
    """Check that `run.init_from` fits this run, whose tokenizer has this fingerprint. Without torch.

    Raises:
        UserError: it has no checkpoint, or another model or tokenizer.
    """
    source = Path(config.run.init_from)
    if not config.run.init_from or layout.found(config.run_folder / "checkpoints"):
        return
    if source.resolve() == config.run_folder.resolve():
        raise UserError(f"run.init_from {source} is this run itself")
    try:
        run_folder.run_id(source)
        other = sources.from_file(source / "config.toml").model
        save_load.load(source / "tokenizer", fingerprint)
    except ValueError as error:
        raise UserError(f"run.init_from: {error}") from None
    if not layout.found(source / "checkpoints"):
        raise UserError(f"run.init_from {source} has no checkpoint yet")
    different = [
        f"model.{item.name} is {getattr(other, item.name)!r} there and {getattr(config.model, item.name)!r} here"
        for item in dataclasses.fields(other)
        if item.name not in _FREE and getattr(other, item.name) != getattr(config.model, item.name)
    ]
    if different:
        raise UserError(f"run.init_from {source} has another model: {'; '.join(different)}")


def load(source: Path, model: nn.Module, ranks: Ranks) -> str:
    """Load the weights of `model`; return a message that says where they come from. A collective.

    Raises:
        UserError: there is no valid checkpoint, or it has another model.
    """
    from hpcgpt.checkpoint import load as checkpoint_load

    newest = checkpoint_load.newest_valid(source / "checkpoints", ranks, None)
    if newest is None:
        raise UserError(f"run.init_from {source} has no checkpoint yet")
    state = checkpoint_load.load(newest, model, None, ranks)
    return f"first weights from {newest}, step {state.step:,}"
