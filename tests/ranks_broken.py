"""``python -m tests.ranks_broken RANK WHERE ERROR TRAIN_ARGUMENTS``: train, where WHERE of one rank raises ERROR.

WHERE is a function of ours, ERROR an expression: what a library or a bad machine would raise in there.
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
