"""``python -m hpcgpt.lm_eval ...``: the command line of lm-evaluation-harness, with the model ``hpcgpt``.

lm_eval finds models of other packages only once they are registered in its process, so this command registers ours
(``hpcgpt.lm_eval.adapter``) and hands its arguments on.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

from hpcgpt import cli
from hpcgpt.distributed import world
from hpcgpt.errors import UserError

ABOUT = (
    "Run lm-evaluation-harness on a run's checkpoint. All arguments are those of lm_eval, which has one more model, "
    "hpcgpt, with --model_args run=RUN[,step=N][,best=True]. `hpcgpt lm-eval run --help` lists them. For local files "
    "of questions `hpcgpt eval --tasks` needs no other package, and divides them among ranks."
)
EXAMPLE = "hpcgpt lm-eval run --model hpcgpt --model_args run=runs/gpt2-124m --tasks hellaswag,arc_easy --batch_size 16"


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'hpcgpt[lm-eval]'")
    here = world.discover()
    if here.size > 1:
        raise UserError(
            f"{here} was started: lm-eval runs on one process; `hpcgpt eval --tasks` divides questions among ranks"
        )
    # Imported here, since they load torch and Hugging Face's libraries.
    from lm_eval.__main__ import cli_evaluate

    from hpcgpt.lm_eval import adapter

    adapter.register()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.argv = ["hpcgpt lm-eval", *argv]  # lm_eval reads its arguments from there
    cli_evaluate()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcgpt lm-eval", description=ABOUT, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of lm_eval")
    return parser


if __name__ == "__main__":
    cli.run(main)
