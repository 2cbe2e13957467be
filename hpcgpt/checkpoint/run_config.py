"""The configuration of a run that has checkpoints, for commands that use its model.

No torch in here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpcgpt.checkpoint import layout
from hpcgpt.config import sources
from hpcgpt.config.options import Config, Part
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder


def config(folder: Path) -> Config:
    """What the run in `folder` was started with.

    Raises:
        UserError: there is no run, or it has no checkpoint yet, damaged ones included.
    """
    run_folder.run_id(folder)
    checkpoints = folder / "checkpoints"
    if not (layout.found(checkpoints) or layout.damaged(checkpoints)):
        raise UserError(
            f"{folder} has no checkpoint yet, so there is no model to look at: training writes one every "
            f"checkpoint.every steps, and before it leaves; `python -m hpcgpt.status {folder}` says how it is going"
        )
    path = folder / "config.toml"
    if not path.exists():
        raise UserError(f"{folder} has checkpoints and no config.toml: bring it back, or start the run once more")
    return _from_here(sources.from_file(path), folder)


def _from_here(settings: Config, folder: Path) -> Config:
    """With the paths of an older run, which kept relative ones, from the folder that it was started in."""
    below = Path(settings.run.dir) / settings.run.name
    here = folder.resolve()
    if below.is_absolute() or here.parts[-len(below.parts) :] != below.parts:
        return settings
    base = here.parents[len(below.parts) - 1]

    def found(path: str) -> str:
        return str(base / path) if path and (base / path).exists() else path

    mix = tuple(Part(found(part.dir), part.weight) for part in settings.data.mix)
    return replace(settings, data=replace(settings.data, dir=found(settings.data.dir), mix=mix))
