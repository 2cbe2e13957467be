"""``python -m hpcgpt.eval RUN``: evaluate a run's checkpoint on its validation split, by default on all of it.

The metrics are those that training logs (``hpcgpt.training.evaluation``): over the whole split, on the same kind of
machine and one rank, they are bit-identical.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hpcgpt import cli
from hpcgpt.checkpoint import run_config
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError

if TYPE_CHECKING:
    from hpcgpt.checkpoint.load_model import Trained

LINE_EVERY_S = 30.0


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if options.batches < 0:
        raise UserError(f"--batches: {options.batches} must be at least 0")
    folder = Path(paths.expand(options.RUN, "RUN"))
    run_config.config(folder)
    # Imported here, since it loads torch.
    from hpcgpt.checkpoint import load_model

    model = load_model.load(folder, options.step, options.best)
    model = dataclasses.replace(model, config=_with_data(model.config, options.data_dir, options.data_mix))
    started_at = time.monotonic()
    report = {"path": str(model.path), "step": model.state.step, **_figures(model, options.batches)}
    report["elapsed_s"] = time.monotonic() - started_at
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"{report['path']}: {report['tokens']:,} tokens of validation in {report['elapsed_s']:.1f} s")
    for name, value in report.items():
        if name.startswith("val/"):
            print(f"  {name:18} {value:.6f}")
    return 0


def _figures(model: Trained, batches: int) -> dict[str, Any]:
    """Compute the ``val/...`` metrics of `hpcgpt.training.evaluation`, and ``tokens``: the number of their targets.

    Raises:
        UserError: there is no validation split, or it is not that of the run.
    """
    from hpcgpt import plan
    from hpcgpt.training.evaluation import EvalContext, bytes_per_token, evaluate_all, validation_sets

    config = model.config
    # With eval.every 0 the plan would not open the split; and the run that `init_from` names may have been deleted.
    evaluated, run = dataclasses.replace(config.eval, every=1), dataclasses.replace(config.run, init_from="")
    planned = plan.make(dataclasses.replace(config, eval=evaluated, run=run), world_size=1)
    if changed := plan.changes(model.state.identity, planned.identity):
        raise UserError(f"{model.path} was trained with other data or settings: {'; '.join(changed)}")
    sets, token_bytes = validation_sets(planned), bytes_per_token(model.tokenizer, config.model.vocab_size)
    context = EvalContext(batches, config.train.micro_batch, token_bytes, model.ranks, model.as_trained)
    rounds = sum(-(-context.count(part.windows) // context.micro_batch) for part in sets)
    with Progress(rounds) as progress:
        figures = evaluate_all(model.model, sets, dataclasses.replace(context, stopped=progress.next_batch))
    assert figures is not None, "None is returned only if `stopped` returns True"
    return figures | {"tokens": config.model.block_size * sum(context.count(part.windows) for part in sets)}


class Progress:
    """Shows the progress in batches: a bar on a terminal, else a line on stderr every `every_s` seconds."""

    def __init__(self, total: int, every_s: float = LINE_EVERY_S) -> None:
        self._total, self._every_s, self._started = total, every_s, -1
        self._line_at = time.monotonic() + every_s
        self._bar = tqdm(total=total, unit="batch", dynamic_ncols=True, disable=not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def next_batch(self) -> bool:
        """Count one more batch as started. Always returns False: the evaluation is not to be stopped."""
        self._started += 1
        if not self._bar.disable:
            self._bar.update(self._started - self._bar.n)
        elif time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + self._every_s
            done = self._started / max(1, self._total)
            print(f"{self._started:,} of {self._total:,} batches, {done:.0%}", file=sys.stderr, flush=True)
        return False


def _with_data(settings: Config, folder: str | None, mix: str | None) -> Config:
    """Return the settings with another data.dir or data.mix, for shards that have moved."""
    if folder is None and mix is None:
        return settings
    data: dict[str, Any] = {"dir": "", "mix": ()}
    for key, text in (("dir", folder), ("mix", mix)):
        try:
            data |= {} if text is None else {key: sources.from_text("data", key, text)}
        except UserError as error:
            raise UserError(f"--data.{key}: {error}") from None
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **data))


def _parser() -> argparse.ArgumentParser:
    about = "Compute the loss of a run's newest checkpoint on its validation split."
    parser = argparse.ArgumentParser(prog="hpcgpt eval", description=about)
    parser.add_argument("RUN", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument(
        "--batches", type=int, default=0, help="batches of train.micro_batch sequences (default: 0, the whole split)"
    )
    moved = parser.add_mutually_exclusive_group()
    moved.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="the run's shards, if they have moved")
    moved.add_argument("--data.mix", dest="data_mix", metavar="DIR:WEIGHT,...", help="the same for a run with data.mix")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    return parser


if __name__ == "__main__":
    cli.run(main)
