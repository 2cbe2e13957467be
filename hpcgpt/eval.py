"""``python -m hpcgpt.eval RUN``: evaluate a run's checkpoint on its validation split, by default on all of it; with
``--tasks FILE...`` on tasks instead (``hpcgpt.tasks``), which several ranks may divide.

The metrics of the split are those that training logs (``hpcgpt.training.evaluation``): over the whole split, on the
same kind of machine and one rank, they are bit-identical.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from hpcgpt import cli
from hpcgpt.checkpoint import run_config
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.distributed.world import World
from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted
from hpcgpt.run import metrics_file, which_runs
from hpcgpt.tasks import questions, report, requests

if TYPE_CHECKING:
    from hpcgpt.checkpoint.load_model import Trained

LINE_EVERY_S = 30.0


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if options.batches < 0:
        raise UserError(f"--batches: {options.batches} must be at least 0")
    folder = which_runs.given(options)
    settings = run_config.config(folder)
    _check_combination(options)
    if options.tasks:
        here = world.discover()
        work = partial(_on_tasks, folder, settings, options, here)
        return work() if here.size == 1 else _leave_after(work)
    if (here := world.discover()).size > 1:
        raise UserError(
            f"{here.size} ranks were started, and each would evaluate the whole validation split: start one process, "
            "without srun or torchrun. Only --tasks are divided among ranks"
        )
    # Imported here, since it loads torch.
    from hpcgpt.checkpoint import load_model

    model = load_model.load(folder, options.step, options.best)
    model = dataclasses.replace(model, config=_with_data(model.config, options.data_dir, options.data_mix))
    started_at = time.monotonic()
    report = {"path": str(model.path), "step": model.state.step, **_figures(model, options.batches)}
    report["elapsed_s"] = time.monotonic() - started_at
    if options.json:
        print(json.dumps(metrics_file.finite(report)))
        return 0
    print(f"{report['path']}: {report['tokens']:,} tokens of validation in {report['elapsed_s']:.1f} s")
    for name, value in report.items():
        if name.startswith("val/"):
            print(f"  {name:18} {value:.6f}")
    return 0


def _check_combination(options: argparse.Namespace) -> None:
    """Raise UserError if an option has no effect: some are for tasks only, and some for the validation split only."""
    of_tasks = {"--limit": options.limit, "--batch": options.batch, "--device": options.device}
    of_split = {"--batches": options.batches, "--data.dir": options.data_dir, "--data.mix": options.data_mix}
    for name, value in (of_split if options.tasks else of_tasks).items():
        if value:
            raise UserError(f"{name} has no effect {'with' if options.tasks else 'without'} --tasks: leave it out")
    for name in ("--limit", "--batch"):
        if of_tasks[name] < 0:
            raise UserError(f"{name}: {of_tasks[name]} must be at least 1")


def _leave_after(work: Callable[[], int]) -> NoReturn:
    """Do the work of one rank of several, and end it as `hpcgpt train` does, also after an error.

    Threads of gloo may still hold Python objects, and abort a process that finalizes the interpreter.
    """
    try:
        status = work()
        sys.stdout.flush()
    except BrokenPipeError:  # as in `cli.run`: the reader has exited
        status = 0
    except Exception as error:
        if cli.wants_traceback():
            raise
        status = cli.print_ending(error)
    os._exit(status)


def _on_tasks(folder: Path, settings: Config, options: argparse.Namespace, here: World) -> int:
    """Evaluate on tasks, divided among the ranks that were started; rank 0 prints the result."""
    tasks = questions.read_all([paths.expand(path, "--tasks") for path in options.tasks], options.limit)
    if here.is_first:
        for task in tasks:
            print(
                f"{task.path}: {counted(len(task.questions), 'question')}, form {task.form}",
                file=sys.stderr,
                flush=True,
            )
    # Imported here, since they load torch.
    from hpcgpt.checkpoint import load_model
    from hpcgpt.tasks import evaluation, likelihood

    model = load_model.load(folder, options.step, options.best, options.device, here)
    encoded = requests.encode(tasks, model.tokenizer, model.config.model.block_size)
    how = likelihood.Computation(options.batch or settings.train.micro_batch, model.ranks, model.computing)
    results = []
    with Progress(sum(how.rounds(one.count) for one in encoded), shown=here.is_first) as progress:
        how = dataclasses.replace(how, stopped=progress.next_batch)
        for one in encoded:
            figures = evaluation.evaluate(model.model, one, how)
            assert figures is not None, "None is returned only if `stopped` returns True"
            results.append(report.of_task(one.task, figures, one.truncated))
    if here.is_first:
        about = {"path": str(model.path), "step": model.state.step, "dtype": str(model.dtype).removeprefix("torch.")}
        whole = about | {"tasks": {one.task.name: result for one, result in zip(encoded, results, strict=True)}}
        print(json.dumps(whole) if options.json else report.as_text(whole))
    return 0


def _figures(model: Trained, batches: int) -> dict[str, Any]:
    """Compute the ``val/...`` metrics of `hpcgpt.training.evaluation`, and ``tokens``: the number of their targets.

    Raises:
        UserError: there is no validation split, or it is not that of the run.
    """
    from hpcgpt import plan
    from hpcgpt.training.evaluation import EvalContext, bytes_per_token, evaluate_all, validation_sets

    config = model.config
    try:
        # With eval.every 0 the run has not opened the split.
        planned = plan.open_to_read(config, model.state, validation=True)
    except UserError as error:
        raise UserError(f"{model.path}: {error}") from None
    sets, token_bytes = validation_sets(planned), bytes_per_token(model.tokenizer, config.model.vocab_size)
    context = EvalContext(batches, config.train.micro_batch, token_bytes, model.ranks, model.as_trained)
    rounds = sum(-(-context.count(part.windows) // context.micro_batch) for part in sets)
    with Progress(rounds) as progress:
        figures = evaluate_all(model.model, sets, dataclasses.replace(context, stopped=progress.next_batch))
    assert figures is not None, "None is returned only if `stopped` returns True"
    return figures | {"tokens": config.model.block_size * sum(context.count(part.windows) for part in sets)}


class Progress:
    """Shows the progress in batches: a bar on a terminal, else a line on stderr every `every_s` seconds."""

    def __init__(self, total: int, every_s: float = LINE_EVERY_S, shown: bool = True) -> None:
        self._total, self._every_s, self._started = total, every_s if shown else math.inf, -1
        self._line_at = time.monotonic() + self._every_s
        self._bar = tqdm(total=total, unit="batch", dynamic_ncols=True, disable=not shown or not sys.stderr.isatty())

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
    about = (
        "Compute the loss of a run's newest checkpoint on its validation split. With --tasks: its accuracy on multiple "
        "choice and last-word questions, on one process or divided among the ranks of srun or torchrun; see "
        "docs/evaluation.md."
    )
    parser = argparse.ArgumentParser(prog="hpcgpt eval", description=about)
    which_runs.add_to(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the smallest validation loss")
    parser.add_argument(
        "--batches", type=int, default=0, help="batches of train.micro_batch sequences (default: 0, the whole split)"
    )
    moved = parser.add_mutually_exclusive_group()
    moved.add_argument("--data.dir", dest="data_dir", metavar="DIR", help="the run's shards, if they have moved")
    moved.add_argument("--data.mix", dest="data_mix", metavar="DIR:WEIGHT,...", help="the same for a run with data.mix")
    tasks = parser.add_argument_group("tasks, instead of the validation split")
    tasks.add_argument(
        "--tasks", nargs="+", metavar="FILE", help="questions as .jsonl, in the form of HellaSwag, ARC or LAMBADA"
    )
    tasks.add_argument(
        "--limit", type=int, default=0, metavar="N", help="only the first N questions of each file (default: all)"
    )
    tasks.add_argument(
        "--batch", type=int, default=0, metavar="N", help="answers in a forward pass (default: train.micro_batch)"
    )
    tasks.add_argument("--device", choices=("auto", "cpu", "cuda"), default="", help="default: that of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for scripts")
    return parser


if __name__ == "__main__":
    cli.run(main)
