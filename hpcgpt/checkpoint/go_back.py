"""Goes back to an older checkpoint: ``checkpoint.step`` in a configuration, or ``hpcgpt checkpoint back``.

Newer checkpoints are not deleted. They are moved, with a copy of metrics.jsonl as it was, into a folder that no other
part of the program looks into::

    checkpoints/
      step_000000004/
      newer_than_000000004.g0003/       set aside by generation 3
        step_000000008/ ...
        metrics.jsonl

After that, the checkpoint of that step is the newest, and an attempt continues from it as always.

``checkpoint.step`` stays on the command line of a job that is requeued, and in a configuration file. So it acts once:
checkpoints record the value (`State.in_effect`), and where the newest one has the same, it descends from that step.

No torch in here.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.storage import atomic
from hpcgpt.storage.lease import Lease

KEY = "checkpoint.step"


def check(config: Config) -> None:
    """Check that a run has the checkpoint that `checkpoint.step` names, if it still has to go back.

    Raises:
        UserError: it has not; the message says which there are.
    """
    if config.checkpoint.step and not was_done(config):
        find(config.run_folder, config.checkpoint.step, KEY)


def was_done(config: Config) -> bool:
    """Return whether the run has gone back to `checkpoint.step` already, and has been saved since."""
    wanted = config.checkpoint.step
    newest = _newest_state(config.run_folder / "checkpoints")
    return newest is not None and newest.step > wanted and newest.in_effect.get(KEY) == wanted


def find(run: Path, step: int, asked_by: str) -> Path:
    """Return the checkpoint of `step`. `asked_by`: the name of the option, for messages.

    Raises:
        UserError: there is none; the message says which there are, or where it was moved to.
    """
    path = layout.path_of(run / "checkpoints", step)
    if path.is_dir():
        return path
    steps = [layout.step_of(one) for one in layout.found(run / "checkpoints")]
    there = f"those of steps {', '.join(f'{one:,}' for one in sorted(steps))}" if steps else "none"
    aside = [one for one in kept_aside(run / "checkpoints") if one.name == path.name]
    raise UserError(
        f"{asked_by} {step}: {run} has no checkpoint of step {step:,}, but {there}; "
        + (
            f"the run has gone back over it since: {aside[-1]} has it, beside the metrics.jsonl of then; to continue "
            f"there, move both back to {path.parent} and {run}"
            if aside
            else "checkpoint.keep_last and checkpoint.keep_every decide which are kept"
        )
    )


# A run goes back in three parts. One process does the first and the last; in between all ranks check the checkpoint,
# because one alone may take longer for a large one than the others wait in a collective.


def target(run: Path, step: int, asked_by: str = KEY) -> Path | None:
    """Return the checkpoint of `step`, to go back to; None if it is the newest already. `asked_by`: see `find`.

    Raises:
        UserError: there is none.
    """
    path = find(run, step, asked_by)
    return path if _newer(run, step) else None


def refuse_damaged(path: Path, problem: str, asked_by: str = KEY) -> None:
    """Raise UserError if the checkpoint to go back to has a `problem`: then nothing is changed."""
    if problem:
        step = layout.step_of(path)
        raise UserError(f"{asked_by} {step}: {path} is damaged ({problem}): choose another")


def _newer(run: Path, step: int) -> list[Path]:
    return [path for path in layout.found(run / "checkpoints") if layout.step_of(path) > step]


def set_aside_newer(run: Path, step: int, lease: Lease) -> str:
    """Set the checkpoints after `step` aside, of which there is at least one; return a message.

    Raises:
        OSError: a checkpoint could not be moved.
    """
    checkpoints, newer = run / "checkpoints", _newer(run, step)
    aside = checkpoints / f"newer_than_{step:09d}.g{lease.number:04d}"
    newest = layout.step_of(newer[0])
    aside.mkdir(exist_ok=True)
    try:
        with (
            suppress(FileNotFoundError),
            open(run / "metrics.jsonl", "rb") as rows,
            atomic.writing(aside / "metrics.jsonl") as copy,
        ):
            shutil.copyfileobj(rows, copy)
    except BaseException:  # a full disk: the run does not go back
        with suppress(OSError):
            aside.rmdir()
        raise
    # Before the first is moved, so that W&B gets the rows of repeated steps, however far this comes.
    run_folder.record(run, "went_back", attempt=lease.number, step=step, from_step=newest, aside=aside.name)
    for path in newer:
        lease.check()
        path.rename(aside / path.name)
    return (
        f"back to step {step:,}: the checkpoints after it, up to step {newest:,}, and a copy of metrics.jsonl are kept "
        f"in {aside}; nothing was deleted"
    )


def state_to_continue_from(config: Config) -> State | None:
    """Return the state of the checkpoint that a start would continue from; None if it would begin anew.

    Sizes and states of checkpoints are checked, checksums are not.

    Raises:
        UserError: there are checkpoints, but all are damaged; or there is none of `checkpoint.step`.
    """
    checkpoints, problems = config.run_folder / "checkpoints", []
    found = layout.found(checkpoints)
    if config.checkpoint.step and not was_done(config):
        found = [find(config.run_folder, config.checkpoint.step, KEY)]
    for path in found:
        problem = layout.check_structure(path)
        if not problem:
            return layout.read_state(path)
        problems.append(f"{path.name}: {problem}")
    if problems:
        raise UserError(
            f"{checkpoints} has checkpoints, but all are damaged ({'; '.join(problems)}): restore one, or choose "
            "another --run.name. Training does not silently start from the beginning"
        )
    return None


def _newest_state(checkpoints: Path) -> State | None:
    """Return the state of the newest checkpoint whose state can be read; None if there is none."""
    for path in layout.found(checkpoints):
        with suppress(OSError, TypeError, ValueError, RecursionError):
            return layout.read_state(path)
    return None


def kept_aside(checkpoints: Path) -> list[Path]:
    """Return the checkpoints that were set aside because the run went back to an older one."""
    folders = [path for path in layout.entries(checkpoints) if path.name.startswith("newer_than_")]
    return [path for folder in sorted(folders) for path in layout.found(folder)]
