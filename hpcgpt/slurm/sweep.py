"""A sweep: one job array, whose tasks are runs that differ in some keys.

    --grid optim.lr=1e-4,3e-4 --grid run.seed=1,2       four runs: every combination
    --grid CONFIG=small.toml,large.toml                 two runs, of two configurations

A run is named after its values, as in ``gpt2-lr0.0003-seed2``, so each has its own folder. Where two would have the
same one, as of a/small.toml and b/small.toml, the grid is refused.

No torch in here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from hpcgpt.config import sources
from hpcgpt.errors import UserError

MOST_TASKS = 1000  # Slurm's MaxArraySize is 1001 by default

Arguments = list[str]


def expand(training: Sequence[str], grid: Sequence[str]) -> list[Arguments]:
    """Return the arguments of training of each task; those of one run if `grid` is empty.

    Raises:
        UserError: a malformed or repeated item, too many runs, or two of them in the same folder.
    """
    if not grid:
        return [list(training)]
    axes = [_axis(item) for item in grid]
    keys = [key for key, _ in axes]
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--grid {repeated[0]} is given twice: write all values after one =, with commas between them")
    combinations = list(itertools.product(*(values for _, values in axes)))
    if len(combinations) > MOST_TASKS:
        raise UserError(f"this grid has {len(combinations):,} runs, and {MOST_TASKS:,} are the most: split it")
    tasks = []
    chosen_in: dict[Path, str] = {}
    for values in combinations:
        chosen = dict(zip(keys, values, strict=True))
        arguments, folder = _arguments(training, dict(chosen))
        settings = " ".join(f"{key}={value}" for key, value in chosen.items())
        before = chosen_in.setdefault(folder.resolve(), settings)
        if before != settings:
            raise UserError(
                f"--grid: the runs of {before} and of {settings} would both have {folder} as their folder, which is "
                "named after the values: rename a file or folder, or submit one of them by itself with --run.name"
            )
        tasks.append(arguments)
    return tasks


def _axis(item: str) -> tuple[str, list[str]]:
    key, given, text = item.partition("=")
    values = text.split(",")
    if not given or not all(values):
        raise UserError(f"--grid {item}: expected KEY=VALUE,VALUE..., as in --grid optim.lr=1e-4,3e-4")
    if key == "run.name":
        raise UserError("--grid run.name: runs are named by their values, after the name in --run.name")
    if twice := [value for value in values if values.count(value) > 1]:
        raise UserError(f"--grid {item}: {twice[0]} is there twice")
    return key, values


def _arguments(training: Sequence[str], chosen: dict[str, str]) -> tuple[Arguments, Path]:
    """Return the arguments of one run, and its folder."""
    config = chosen.pop("CONFIG", "")
    if config and (other := sources.configuration_named(training)):
        raise UserError(f"the configuration is in the grid, {config}, and outside of it: {other}")
    flags = [f"--{key}={value}" for key, value in chosen.items()]
    arguments = [*([config] if config else []), *training, *flags]
    run = sources.from_command_line(arguments, "submit", "", {}).run
    base = run.name
    if config and base == sources.from_command_line([], "submit", "", {}).run.name:
        base = Path(config).stem  # neither the file nor a flag has a name
    parts = [base, *(key.rpartition(".")[2] + re.sub(r"[^\w.+-]", "_", value) for key, value in chosen.items())]
    name = "-".join(parts)
    return [*arguments, f"--run.name={name}"], Path(run.dir) / name
