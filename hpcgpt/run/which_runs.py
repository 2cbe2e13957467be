"""Which runs a user means: every command that takes a run folder, and ``run.init_from``, asks here.

A run is named by its folder, by its name below run.dir, by a pattern, or by a folder that it is in. What exists as a
path wins over a name. A folder is a run folder if it has a run.json (hpcgpt.run.run_folder). Folders of runs are
searched to a depth of DEEPEST, and not inside of run folders, so that a folder of many checkpoints costs nothing.

No torch in here.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from hpcgpt.config import paths
from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError, cannot_read
from hpcgpt.output import terminal

DEEPEST = 3
MOST_NAMED = 8  # runs in an error
RUN_JSON = "run.json"


def add_to(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """Add the arguments RUN and --run.dir to a command; `nargs` of RUN, where it takes several runs."""
    one = "the run's folder, or its name below run.dir"
    parser.add_argument("RUN", nargs=nargs, help="run folders, names, patterns, or folders of runs" if nargs else one)
    parser.add_argument("--run.dir", dest="run_dir", metavar="DIR", help="folder of the runs (default: runs)")


def run_dir(options: argparse.Namespace | None = None) -> Path:
    """Return the folder of the runs: as the arguments of `add_to` say, else the default."""
    # Imported here, so that --help takes a tenth of a second.
    from hpcgpt.config.options import Run

    given = options.run_dir if options else None
    return Path(Run().dir if given is None else paths.expand(given, "--run.dir"))


def given(options: argparse.Namespace) -> Path:
    """Return the folder of the run that the arguments of `add_to` mean; see `one`."""
    return one(options.RUN, run_dir(options))


def one(name: str, below: Path) -> Path:
    """Return the folder of the run that `name` means; `below` is run.dir.

    Raises:
        UserError: it means no run, or several.
    """
    found = _of_name(name, below)
    if len(found) > 1:
        several = newest_first(found)
        raise UserError(
            f"'{terminal.printable(name)}' means {len(found):,} runs, and one is needed: {_listed(several)}"
        )
    return found[0]


def exact(name: str, below: Path) -> Path:
    """Return the run folder `name`, or the run of that name below run.dir: no pattern, and no folder of runs.

    Raises:
        UserError: there is none.
    """
    name = _expanded(name, below, "the run")
    for folder in (Path(name), below / name):
        if _is_folder(folder) and is_run(folder):
            return folder
    raise UserError(_absent(name, below))


def find(names: Sequence[str], below: Path) -> list[Path]:
    """Return the run folders that `names` mean; `below` is run.dir. Those that changed last come first.

    Raises:
        UserError: a name means no run.
    """
    if not names:
        found = list(_below(below))
        if not found:
            raise UserError(
                f"no runs below {below}, here in {Path.cwd()}: give the folders of runs, or of one run, as arguments"
            )
        return newest_first(found)
    found = [folder for name in names for folder in _of_name(name, below)]
    return newest_first(dict.fromkeys(found))


def newest_first(folders: Sequence[Path] | dict[Path, None]) -> list[Path]:
    return sorted(folders, key=lambda folder: (-_changed_at(folder), str(folder)))


def is_run(folder: Path) -> bool:
    with suppress(OSError):
        return (folder / RUN_JSON).exists()
    return True  # it may not be looked into: reading it gives the reason


def _of_name(name: str, below: Path) -> list[Path]:
    """Return the run folders that one argument means."""
    name = _expanded(name, below, "RUN")
    shown = terminal.printable(name)
    for folder in (Path(name), below / name):
        if _is_folder(folder):
            if is_run(folder):
                return [folder]
            if inside := list(_below(folder)):
                return inside
            if folder == Path(name):
                nothing = f"no run in {shown}: there is no {RUN_JSON}, nor runs in folders below"
                raise UserError(f"{nothing}; below {_where(below)} there {_are(name, below)}")
    if glob.has_magic(name):
        folders = [Path(path) for path in glob.glob(name) if Path(path).is_dir()]  # noqa: PTH207  # also absolute
        found = [run for folder in folders for run in ([folder] if is_run(folder) else _below(folder))]
        found += [run for run in _below(below) if fnmatch.fnmatch(run.relative_to(below).as_posix(), name)]
        if found:
            return list(dict.fromkeys(found))
        raise UserError(f"no run matches '{shown}', neither here nor below {_where(below)}; there {_are(name, below)}")
    raise UserError(_absent(name, below))


def _expanded(name: str, below: Path, what: str) -> str:
    """Expand a name like a path, unless a run has it as it is; `what` names the argument in errors."""
    return name if name and os.path.lexists(below / name) else paths.expand(name, what)


def _absent(name: str, below: Path) -> str:
    shown = terminal.printable(name)
    return f"no run in {shown}, nor a run of that name below {_where(below)}; there {_are(name, below)}"


def _is_folder(path: Path) -> bool:
    """Return whether this is a folder.

    Raises:
        UserError, InputError: that cannot be seen; see errors.cannot_read.
    """
    try:
        return path.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise cannot_read(error, f"no run in {terminal.printable(str(path))}: {error.strerror}") from None


def _where(below: Path) -> str:
    """Name the folder of the runs, and the folder in which it was looked for."""
    shown = terminal.printable(str(below))
    return shown if below.is_absolute() else f"{shown} in {Path.cwd()}"


def _are(name: str, below: Path) -> str:
    """Say which runs are below run.dir, and which of them `name` may mean."""
    runs = newest_first(list(_below(below)))
    if not runs:
        return "are no runs"
    names = [run.relative_to(below) for run in runs]
    # A folder of this name, without a run, wins over the run.
    meant = f" (did you mean {below / name}?)" if below / name in runs else nearest(name, [str(run) for run in names])
    return f"{'is' if len(names) == 1 else 'are'} {_listed(names)}{meant}"


def _listed(runs: Sequence[Path]) -> str:
    """Name some runs, and say how many others there are."""
    shown = [terminal.printable(str(run)) for run in runs[:MOST_NAMED]]
    more = [f"{len(runs) - len(shown):,} more"] if len(runs) > len(shown) else []
    *first, last = [*shown, *more]
    return f"{', '.join(first)} and {last}" if first else last


def _below(folder: Path, depth: int = 1) -> Iterator[Path]:
    """Yield the run folders below a folder."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _leads_to_folder(entry))
    except OSError:
        return
    for name in names:
        path = folder / name
        if is_run(path):
            yield path
        elif depth < DEEPEST:
            yield from _below(path, depth + 1)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself, or into a folder that is closed
        return entry.is_dir()
    return False


def _changed_at(folder: Path) -> float:
    """Return when a run last wrote an event or a row; 0 if that cannot be seen."""
    times = [0.0]
    for name in ("metrics.jsonl", "events.jsonl", RUN_JSON):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)
