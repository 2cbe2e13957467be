"""``python -m hpcgpt.eval RUN``: the loss of a run's checkpoint on its validation split, all of it by default.

The figures are those of ``hpcgpt.evaluate``, which training logs: over the whole split, on the same kind of machine and
one rank, they are the same to the last bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt import cli, runfolder
from hpcgpt.errors import UserError

if TYPE_CHECKING:
    from hpcgpt.trained import Trained


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if options.batches < 0:
        raise UserError(f"--batches: {options.batches} must be at least 0")
    folder = Path(options.RUN)
    runfolder.run_id(folder)
    # Late: it loads torch.
    from hpcgpt import trained

    model = trained.load(folder, options.step, options.best)
    started_at = time.monotonic()
    told = {"path": str(model.path), "step": model.state.step, **_figures(model, options.batches)}
    told["elapsed_s"] = time.monotonic() - started_at
    if options.json:
        print(json.dumps(told))
        return 0
    print(f"{told['path']}: {told['tokens']:,} tokens of validation in {told['elapsed_s']:.1f} s")
    for name, value in told.items():
        if name.startswith("val/"):
            print(f"  {name:18} {value:.6f}")
    return 0


def _figures(model: Trained, batches: int) -> dict[str, Any]:
    """``val/...`` as `hpcgpt.evaluate` tells them, and how many target ``tokens`` they are of.

    Raises:
        UserError: the validation split is not there, or is no longer the one of the run.
    """
    from hpcgpt import plan
    from hpcgpt.evaluate import Terms, bytes_of_ids, evaluate_all, held_out

    config = model.config
    # The split is asked for also where training left it alone; and where the first weights came from is long past.
    evaluated, begun = dataclasses.replace(config.eval, every=1), dataclasses.replace(config.run, init_from="")
    wanted = dataclasses.replace(config, eval=evaluated, run=begun)
    planned = plan.make(wanted, world_size=1)
    if changed := plan.changes(model.state.identity, planned.identity):
        raise UserError(f"{model.path} was trained with other data or settings than are there: {'; '.join(changed)}")
    sets, token_bytes = held_out(planned), bytes_of_ids(model.words, config.model.vocab_size)
    terms = Terms(batches, config.train.micro_batch, token_bytes, model.ranks, model.as_trained)
    figures = evaluate_all(model.model, sets, terms)
    assert figures is not None, "nobody told it to stop"
    return figures | {"tokens": config.model.block_size * sum(terms.windows_of(part.windows) for part in sets)}


def _parser() -> argparse.ArgumentParser:
    about = "The loss of a run's checkpoint, the newest one, on its validation split."
    parser = argparse.ArgumentParser(prog="hpcgpt eval", description=about)
    parser.add_argument("RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument(
        "--batches", type=int, default=0, help="batches of train.micro_batch sequences (default: 0, the whole split)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for scripts")
    return parser


if __name__ == "__main__":
    cli.run(main)
