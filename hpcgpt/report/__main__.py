"""``hpcgpt report RUN... -o report.html``: show runs on one HTML page, to read, mail or print.

The page has no scripts and loads nothing, so it can be opened from a disk, without a network. It reads the run folders
and writes only the page. No torch in here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.errors import UserError, sentence
from hpcgpt.output.counted import counted
from hpcgpt.run import which_runs

_EPILOG = """\
RUN is a run's folder, its name below run.dir, a folder of runs, or a pattern in quotes ('sweep-*'). Several runs are
drawn over each other.
"""


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folders = which_runs.find(options.RUN, which_runs.run_dir(options))
    out = Path(paths.expand(options.out, "--out"))
    _check(out)
    content = _page(folders)
    if options.out == "-":
        sys.stdout.buffer.write(content)
        return 0
    from hpcgpt.storage import atomic

    atomic.write(out, content)
    print(f"{out}: {counted(len(folders), 'run')}, {len(content) / 1000:,.0f} kB")
    return 0


def _page(folders: Sequence[Path]) -> bytes:
    """Read the runs and compose the page. A run that cannot be read is named on it, unless it is the only one."""
    from hpcgpt.report import facts, page
    from hpcgpt.slurm.queue import Queue
    from hpcgpt.status import run_status

    queue, now = Queue(), time.time()
    queue.load(job for folder in folders for job in run_status.jobs(folder))
    found, unreadable = [], []
    for folder in folders:
        try:
            found.append(facts.read(folder, now, queue))
        except (OSError, UserError) as error:
            if len(folders) == 1:
                raise
            unreadable.append((str(folder), sentence(error)))
    if not found:
        raise UserError(f"none of the {len(folders)} runs can be read: {unreadable[0][0]}: {unreadable[0][1]}")
    return page.page(found, unreadable, now).encode()


def _check(out: Path) -> None:
    """Refuse to replace a file that is no report, before runs are read."""
    from hpcgpt.output import terminal
    from hpcgpt.report.page import MADE_BY

    name = terminal.printable(str(out))
    if out.is_dir():
        raise UserError(f"-o {name} is a folder: name a file in it, such as {name}/report.html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"-o {name}: there is no folder {terminal.printable(str(out.parent))}")
    if out.is_file():
        with open(out, "rb") as file:
            head = file.read(2000)
        tag = f'<meta name="generator" content="{MADE_BY}"'.encode()
        if head and not (head.startswith(b"<!DOCTYPE html>\n<html") and tag in head):
            raise UserError(f"-o {name}: this file exists and is no report of hpcgpt: choose another name")
    elif out.exists():
        raise UserError(f"-o {name} exists and is no regular file: choose another name")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpcgpt report", description="Show runs on one HTML page, without scripts, to read, mail or print.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which_runs.add_to(parser, nargs="+")
    parser.add_argument(
        "-o", "--out", default="report.html", metavar="FILE", help="the page (default: report.html; -: standard output)"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
