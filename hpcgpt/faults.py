"""Where a rank that ended by an error says so."""

from pathlib import Path

from hpcgpt import world
from hpcgpt.world import World


def path(folder: Path, here: World) -> Path:
    return folder / "faults" / (world.job_attempt() or here.attempt) / f"rank_{here.rank:05d}.json"


def write(folder: Path, here: World, status: int, reason: str, trace: str, step: int | None) -> None:
    pass
