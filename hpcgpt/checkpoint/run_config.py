"""Reads the configuration of a run that has checkpoints, for commands that use its model.

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
    """Return the configuration of the run in `folder`.

    Raises:
        UserError: there is no run, or it has no checkpoint yet, not even a damaged one.
    """
    run_folder.run_id(folder)
    checkpoints = folder / "checkpoints"
    if not (layout.found(checkpoints) or layout.damaged(checkpoints)):
        raise UserError(
            f"{folder} has no checkpoint yet, so there is no model to look at: training writes one every "
            f"checkpoint.every steps, and when it stops; see `python -m hpcgpt.status {folder}`"
        )
    path = folder / "config.toml"
    if not path.exists():
        raise UserError(f"{folder} has checkpoints and no config.toml: restore it, or start the run again")
    return _from_here(sources.from_file(path), folder)


def _from_here(settings: Config, folder: Path) -> Config:
    """Make the relative paths of an older run absolute: they begin in the folder that it was started in."""
    relative = Path(settings.run.dir) / settings.run.name
    here = folder.resolve()
    if relative.is_absolute() or here.parts[-len(relative.parts) :] != relative.parts:
        return settings
    base = here.parents[len(relative.parts) - 1]

    def absolute(path: str) -> str:
        return str(base / path) if path and (base / path).exists() else path

    mix = tuple(Part(absolute(part.dir), part.weight) for part in settings.data.mix)
    return replace(settings, data=replace(settings.data, dir=absolute(settings.data.dir), mix=mix))
