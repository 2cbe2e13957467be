"""``python -m hpcgpt.export RUN --to hf|nanogpt|llmc OUT``: write a run's weights for another program, and check them.

Loads torch late, so that its help is quick.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli
from hpcgpt.checkpoint import run_config
from hpcgpt.config import paths
from hpcgpt.exit_codes import FAILED
from hpcgpt.export import new_folder
from hpcgpt.output import streams
from hpcgpt.run import which_runs


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    folder, out = which_runs.given(options), Path(paths.expand(options.OUT, "OUT"))
    config = run_config.config(folder)
    new_folder.check(out)
    # Imported here, since they load torch.
    from hpcgpt.export import exporting
    from hpcgpt.export.agreement import DisagreementError

    command = f"hpcgpt export {shlex.join(argv)}"
    try:
        source = exporting.open_source(folder, config, options.step, options.best, options.dtype)
        exporting.export(source, options.to, out, command, lambda line: print(line, flush=True))
    except DisagreementError as error:
        message = f"the export does not compute what the run does, so {out} is not written: {error}"
        return cli.print_error(RuntimeError(message), FAILED)
    return 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Write a run's weights in the format of another program. The result is checked against the run before it gets "
        "its name: the same logits in float64, on windows of the validation split."
    )
    parser = argparse.ArgumentParser(prog="hpcgpt export", description=about)
    which_runs.add_to(parser)
    parser.add_argument("OUT", help="folder to make; it must not exist")
    parser.add_argument(
        "--to",
        required=True,
        choices=("hf", "nanogpt", "llmc"),
        help="hf: a folder for Hugging Face's transformers, with tokenizer; nanogpt: a ckpt.pt; llmc: a model.bin",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
