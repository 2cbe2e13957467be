"""``hpcgpt status [RUN...]``: show how runs are going.

    hpcgpt status                   a line for each run below run.dir, newest first
    hpcgpt status RUN               the figures of a run, and why it waits
    hpcgpt status RUN --why         a line for each attempt: how it ended, and what was decided
    hpcgpt status RUN --history     each attempt in detail, and what the time was spent on
    hpcgpt status [RUN...] --watch  a live view

It reads the run folders, on any machine that sees them, and writes nothing. Slurm is asked once about all jobs. No
torch in here.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.errors import UserError
from hpcgpt.run import which_runs

_USUAL = -1.0  # --watch without a number

_EPILOG = """\
RUN is a run's folder, its name below run.dir, a folder of runs, or a pattern in quotes ('sweep-*'). Without RUN: all
runs below run.dir (./runs). One run is shown with all figures, several in a table with a line each.

states: new, imported, pending, starting, running, stale, finished, saved, requeued, held, stopped, failed; see
docs/status.md.
"""


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    default = which_runs.run_dir(options)

    def find() -> list[Path]:
        return which_runs.find(options.RUN, default)

    if options.watch is not None:
        from hpcgpt.status import watch

        watch.watch(find, None if options.watch == _USUAL else options.watch, os.environ.get("TERM", ""))
    elif options.RUN or options.why or options.history or options.json:
        _show(find(), options)
    else:
        _show_all(find, options)
    return 0


def _show_all(find: Callable[[], list[Path]], options: argparse.Namespace) -> None:
    """Print all runs below run.dir, and the jobs that wait and have no run folder yet."""
    from hpcgpt.slurm import queue
    from hpcgpt.status import run_status, table

    problem, folders = None, []
    try:
        folders = find()
    except UserError as error:
        problem = error
    known = {job for folder in folders for job in run_status.jobs(folder)}
    waiting = table.without_run(queue.without_run(known), time.time(), _width())
    if problem and not waiting:
        raise problem
    if folders:
        _show(folders, options)
    if waiting:
        print("\n".join(["", *waiting] if folders else waiting))


def _show(folders: Sequence[Path], options: argparse.Namespace) -> None:
    """Print one run, or a table of several."""
    from hpcgpt.output import terminal
    from hpcgpt.slurm.queue import Queue
    from hpcgpt.status import run_status, table

    queue, now = Queue(), time.time()
    queue.load(job for folder in folders for job in run_status.jobs(folder))
    if options.why or options.history or len(folders) == 1:
        for folder in folders:
            found = run_status.complete(folder, now, queue, options.history or options.why)
            print(json.dumps(found) if options.json else terminal.for_stdout(_as_text(found, now, options.why)))
        return
    several = [table.brief_or_unreadable(folder, now, queue) for folder in folders]
    if options.json:
        print("\n".join(json.dumps(run) for run in several))
        return
    print("\n".join(table.lines(several, now, _width())))
    if queue.problem and any(run.get("job") for run in several):
        print(f"\nSlurm did not answer ({terminal.printable(queue.problem)}): states are from the run folders alone")


def _as_text(found: dict[str, Any], now: float, with_reasons: bool) -> str:
    from hpcgpt.status import as_text, why

    return why.as_text(found) if with_reasons else as_text.as_text(found, now)


def _width() -> int:
    """Return the columns of stdout's terminal; 80 elsewhere, so that a file has what is documented."""
    try:
        return os.get_terminal_size(1).columns
    except OSError:
        return 80


def _parse(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(
        prog="hpcgpt status", description="Show how runs are going.", epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which_runs.add_to(parser, nargs="*")
    parser.add_argument("--why", action="store_true", help="a line for each attempt: how it ended, what was decided")
    parser.add_argument("--history", action="store_true", help="also show each attempt, and what the time was spent on")
    parser.add_argument(
        "--watch", nargs="?", const=_USUAL, type=float, metavar="S",
        help="follow the runs, every S seconds (default: 2; 30 without a terminal); Slurm is asked at most every 30 s",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per line (docs/reference.md)")
    options = parser.parse_args(_with_default_watch(argv))
    chosen = {
        "watch": options.watch is not None,
        **{name: getattr(options, name) for name in ("json", "why", "history")},
    }
    for one, other in (("watch", "json"), ("watch", "why"), ("watch", "history"), ("why", "history")):
        if chosen[one] and chosen[other]:
            raise UserError(f"--{one} and --{other} cannot be combined")
    if options.watch not in (None, _USUAL) and not 0.1 <= options.watch <= 86400:
        raise UserError(f"--watch {options.watch:g}: expected seconds, from 0.1 to 86400")
    return options


def _with_default_watch(argv: Sequence[str]) -> list[str]:
    """Separate `--watch RUN` from `--watch 5 RUN`: argparse would take any word after --watch for its number."""
    found = []
    for number, word in enumerate(argv):
        following = argv[number + 1] if number + 1 < len(argv) else ""
        found.append(f"--watch={_USUAL}" if word == "--watch" and not _is_number(following) else word)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    cli.run(main)
