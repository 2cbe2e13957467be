"""``hpcgpt NAME ...`` is ``python -m hpcgpt.NAME ...``."""

from __future__ import annotations

import importlib
import sys

from hpcgpt import cli
from hpcgpt.errors import USER_MISTAKE, UserError

COMMANDS = {
    "train": "pretrain a model, or go on with a run",
    "submit": "queue a training job on Slurm",
    "status": "how a run is going",
    "checkpoint": "list, verify and show a run's checkpoints",
    "sample": "generate text from a run's checkpoint",
    "eval": "a checkpoint's loss on the validation split",
    "tracking": "send to Weights & Biases what it lacks of a run",
    "drill": "train under fire: faults of all kinds, and the same bytes in the end",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        rows = "\n".join(f"  {name:10} {about}" for name, about in COMMANDS.items())
        print(f"usage: hpcgpt COMMAND [...]\n\n{rows}\n\n`hpcgpt COMMAND --help` tells more.")
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        sys.exit(cli.complain(UserError(f"no command '{name}'; there are {', '.join(COMMANDS)}"), USER_MISTAKE))
    cli.run(importlib.import_module(f"hpcgpt.{name}").main)


if __name__ == "__main__":
    main()
