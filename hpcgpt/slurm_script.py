"""``hpcgpt slurm-script NAME > FILE``: print a batch script or a site file that comes with hpcgpt.

    hpcgpt slurm-script pretrain > pretrain.sbatch
    sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 pretrain.sbatch gpt2-124m

For sbatch without a checkout, and as a base for your own scripts. `hpcgpt submit` needs no copy.

No torch in here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli
from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.slurm import batch_scripts


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    found = batch_scripts.found()
    if options.list:
        print("\n".join(found))
        return 0
    names = found | {path.relative_to(batch_scripts.FOLDER).as_posix(): path for path in found.values()}
    if options.name not in names:
        asked = f"no script '{terminal.printable(options.name)}'" if options.name else "which script"
        raise UserError(f"{asked}; there are {', '.join(found)}" + nearest(options.name, list(found)))
    sys.stdout.buffer.write(names[options.name].read_bytes())
    if names[options.name].suffix == ".sbatch" and (hint := _hint()):
        print(hint, file=sys.stderr)
    return 0


def _hint() -> str:
    """Return how to make a job use this Python; '' if it will, as in an activated environment."""
    own = Path(".venv/bin/python").absolute()
    found = own if own.exists() else Path(shutil.which("python3") or "/")
    if os.environ.get("HPCGPT_PYTHON") or found.parent == Path(sys.executable).parent:
        return ""
    return f"before sbatch: export HPCGPT_PYTHON={sys.executable}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpcgpt slurm-script", description="Print a batch script or a site file that comes with hpcgpt.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="pretrain, shards, or another of --list")
    parser.add_argument("--list", action="store_true", help="list the names")
    return parser


if __name__ == "__main__":
    cli.run(main)
