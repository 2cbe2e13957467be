"""Which runs a user means: run folders, folders of runs, names of runs, patterns; without any, all runs below run.dir.

A folder is a run folder if it has a run.json (hpcgpt.run.run_folder). Folders of runs are searched to a depth of
DEEPEST, and not inside of run folders, so that a folder of many checkpoints costs nothing.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.output import terminal

DEEPEST = 3
RUN_JSON = "run.json"


def find(names: Sequence[str], default: Path) -> list[Path]:
    """Return the run folders that `names` mean; `default` is run.dir. Those that changed last come first.

    Raises:
        UserError: a name means no run.
    """
    if not names:
        found = list(_below(default))
        if not found:
            raise UserError(
                f"no runs below {default}, here in {Path.cwd()}: give the folders of runs, or of one run, as arguments"
            )
        return newest_first(found)
    found = [folder for name in names for folder in _of_name(name, default)]
    return newest_first(dict.fromkeys(found))


def newest_first(folders: Sequence[Path] | dict[Path, None]) -> list[Path]:
    return sorted(folders, key=lambda folder: (-_changed_at(folder), str(folder)))


def is_run(folder: Path) -> bool:
    with suppress(OSError):
        return (folder / RUN_JSON).exists()
    return True  # it may not be looked into: reading it gives the reason


def _of_name(name: str, default: Path) -> list[Path]:
    """Return the run folders that one argument means."""
    for folder in (Path(name), default / name):
        if folder.is_dir():
            if is_run(folder):
                return [folder]
            if inside := list(_below(folder)):
                return inside
            if folder == Path(name):
                raise UserError(
                    f"no run in {terminal.printable(name)}: there is no {RUN_JSON}, nor runs in folders below"
                )
    if glob.has_magic(name):
        paths = [Path(path) for path in glob.glob(name) if Path(path).is_dir()]  # noqa: PTH207  # also absolute
        paths = [run for path in paths for run in ([path] if is_run(path) else _below(path))]
        below = [run for run in _below(default) if fnmatch.fnmatch(run.relative_to(default).as_posix(), name)]
        if found := list(dict.fromkeys([*paths, *below])):
            return found
        raise UserError(f"no run matches '{terminal.printable(name)}', neither here nor below {default}")
    known = [run.relative_to(default).as_posix() for run in _below(default)]
    raise UserError(
        f"no run in {terminal.printable(name)}, nor a run of that name below {default}{nearest(name, known)}"
    )


def _below(folder: Path, depth: int = 1) -> Iterator[Path]:
    """Yield the run folders below a folder."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return
    for name in names:
        path = folder / name
        if is_run(path):
            yield path
        elif depth < DEEPEST:
            yield from _below(path, depth + 1)


def _changed_at(folder: Path) -> float:
    """Return when a run last wrote an event or a row; 0 if that cannot be seen."""
    times = [0.0]
    for name in ("metrics.jsonl", "events.jsonl", RUN_JSON):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)
