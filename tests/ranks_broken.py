"""``python -m tests.ranks_broken RANK WHERE ERROR TRAIN_ARGUMENTS``: train, while WHERE raises ERROR on one rank.

WHERE is a function of ours, ERROR an expression: an exception of a library or of a failing machine.
"""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    rank, where, error, *arguments = sys.argv[1:]
    sys.argv = ["hpcgpt.train", *arguments]
    from hpcgpt import cli, train

    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == rank:
        module, _, name = where.partition(":")
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)

        def broken(*_arguments: object, **_options: object) -> None:
            raise eval(error)

        setattr(owner, last, broken)
    cli.run(train.main)
