"""Turn text into token shards: ``python -m data_prep.make_shards INPUT... [--val VAL...] --out DIR``.

The input is divided into units of work (``data_prep.text.inputs``). Each unit is made as a whole or not at all
(``data_prep.pipeline.unit``). After the last one, the shards get their final names, and the manifest is written
(``data_prep.pipeline.finalize``)::

    DIR/
      prep/plan.json            inputs, tokenizer and options; written first
      prep/units/000000/        unit 0, finished; removed when all units are
      train_000000.bin ...      see hpcgpt.data.shard_format
      tokenizer/
      skipped.jsonl             the bad input that was skipped, if any
      manifest.json             written last

A rerun skips finished units, so a killed run continues where it stopped. Many machines can share the work: task i of n
makes units i, i+n, ..., and the task that finishes last writes the manifest. The output depends on the plan alone, not
on the number of workers or tasks, nor on what was killed. A folder with another plan, or with files that this command
did not make, is refused; no such file is ever deleted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.encode import encoders
from data_prep.pipeline import data_set
from data_prep.pipeline.plan import PrepPlan, ShardOptions, check_ours
from data_prep.pipeline.task_share import TaskShare
from data_prep.text import inputs, standard_input, unread
from data_prep.text.inputs import InputFile
from data_prep.text.options import Skipped, TextOptions, add_text_arguments, printable_path
from data_prep.text.unread import UnreadFile
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.tokenizer import find_tokenizer

GiB = 1 << 30
VAL_FRACTION = 0.01


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    _check(arguments)
    options = _shard_options(arguments)
    out = Path(paths.expand(arguments.out, "--out"))
    names = [str(_standard_input(out, arguments)) if name == "-" else name for name in arguments.INPUT]
    skipped: list[Skipped] = []
    others: list[UnreadFile] = []
    skips = options.text.on_bad_input == "skip"

    def found(given: Sequence[str]) -> list[InputFile]:
        return inputs.find(given, skipped if skips else None, others, options.text.text_key, out)

    files = found(names)
    val_files = found(arguments.val) if arguments.val else []
    _check_apart(files, val_files)
    unread.check(others, arguments.ignore_other_files)
    inputs.check_options([*files, *val_files], options.text)
    unit_bytes = arguments.unit_mb * 1_000_000 if arguments.unit_mb else _unit_bytes([*files, *val_files])
    units = inputs.units(files, unit_bytes, options.text)
    if val_files:
        options = replace(options, val_units_from=len(units))
        units += inputs.units(val_files, unit_bytes, options.text)
    plan = PrepPlan(options, files, units, unit_bytes, skipped, others, val_files)
    data_set.make(plan, out, arguments.workers, arguments.backend, TaskShare(arguments.task, arguments.tasks))
    return 0


def _check_apart(files: Sequence[InputFile], val_files: Sequence[InputFile]) -> None:
    """Raise UserError if one of the files to validate on is also among those to train on."""
    for_training = {os.path.realpath(file.path) for file in files}
    if both := [file for file in val_files if os.path.realpath(file.path) in for_training]:
        raise UserError(
            f"{printable_path(both[0].path)} is in INPUT and in --val: it would be trained on and validated on. Name "
            "the folders or patterns to train on without it"
        )


def _shard_options(arguments: argparse.Namespace) -> ShardOptions:
    """Make the options of the plan from the flags, and check that the tokenizer's ids fit the dtype."""
    tokenizer = find_tokenizer.find(arguments.tokenizer, arguments.end_of_text)
    width = shard_format.WIDTHS[arguments.dtype]
    if tokenizer.vocab_size > width.most_ids:
        raise UserError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size:,} ids, but {width.name} shards hold "
            f"{width.most_ids:,} at most: pass --dtype uint32 (twice the disk space), take a smaller one, such as "
            "gpt2, or train one with `python -m data_prep.train_tokenizer`"
        )
    return ShardOptions(
        tokenizer=tokenizer,
        text=TextOptions.from_arguments(arguments),
        dtype=arguments.dtype,
        val_fraction=0.0 if arguments.val else arguments.val_fraction,
        min_characters=arguments.min_characters,
        dedup=arguments.dedup == "exact",
        shard_tokens=arguments.shard_tokens,
    )


def _unit_bytes(files: Sequence[InputFile]) -> int:
    """Return the size of a unit: a 64th of the input, but at least 8 and at most 256 MB.

    With many units all workers finish at about the same time. Smaller ones would take longer to flush to the disk than
    to make, and would make more files than necessary.
    """
    return min(max(-(-sum(file.bytes for file in files) // 64), 8_000_000), 256_000_000)


def _standard_input(out: Path, arguments: argparse.Namespace) -> Path:
    """Copy standard input into `out`, so that a rerun can continue with it."""
    if arguments.tasks > 1 or arguments.INPUT.count("-") > 1:
        raise UserError("standard input can be read once only: name files where tasks share the work")
    check_ours(out)
    prep = out / "prep"
    if (prep / "plan.json").is_file() and not any(prep.glob("stdin.*")):
        raise UserError(f"{out} holds shards that were made of other inputs: choose another --out")
    return standard_input.spool(sys.stdin.buffer, prep)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.val and arguments.val_fraction is not None:
        raise UserError("give one of --val and --val-fraction: the documents of --val, or a part of all, are held out")
    if "-" in (arguments.val or ()):
        raise UserError("--val -: standard input can only be text to train on: name files")
    if arguments.val_fraction is None:
        arguments.val_fraction = VAL_FRACTION
    if not 0 <= arguments.val_fraction < 1:
        raise UserError(f"--val-fraction {arguments.val_fraction}: expected 0 or more, and less than 1")
    if arguments.workers < 1 or (arguments.unit_mb is not None and arguments.unit_mb < 1):
        raise UserError("--workers and --unit-mb must be at least 1")
    if not 1 <= arguments.shard_tokens <= shard_format.MOST_TOKENS:
        raise UserError(f"--shard-tokens {arguments.shard_tokens}: expected 1 to {shard_format.MOST_TOKENS}")
    if not 0 <= arguments.task < arguments.tasks:
        raise UserError(
            f"--task {arguments.task} of --tasks {arguments.tasks}: tasks count from 0, up to {arguments.tasks - 1}"
        )
    if arguments.min_characters < 0:
        raise UserError(f"--min-characters {arguments.min_characters}: expected 0 or more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.make_shards", description="Text -> token shards.")
    parser.add_argument(
        "INPUT",
        nargs="+",
        help="files ending in .txt (one document each), .jsonl or .ndjson (one document per line), all also with .gz, "
        ".zst, .xz or .bz2, or .parquet or .arrow (one document per row); folders of them; patterns in quotes, such as "
        "'**/*.txt'; - for standard input",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, another tiktoken encoding, a folder made by train_tokenizer, a Hugging Face tokenizer.json or its "
        "folder (default: gpt2)",
    )
    parser.add_argument(
        "--end-of-text", default="", metavar="TOKEN", help="Hugging Face: the special token between documents"
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help=f"fraction of the documents that is held out for validation (default: {VAL_FRACTION})",
    )
    parser.add_argument(
        "--val",
        nargs="+",
        metavar="VAL",
        help="files, folders or patterns to validate on, instead of --val-fraction: then every INPUT is trained on",
    )
    parser.add_argument(
        "--min-characters", type=int, default=0, metavar="N", help="leave shorter documents out (default: 0)"
    )
    parser.add_argument(
        "--dedup",
        choices=("none", "exact"),
        default="none",
        help="exact: of equal documents keep only the first (default: none)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(shard_format.WIDTHS),
        default="uint16",
        help="type of a token: uint32 for more than 65,536 ids (default: uint16)",
    )
    _add_work_arguments(parser)
    return parser


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that do not change the tokens, only how they are made and where shards end."""
    parser.add_argument(
        "--backend",
        choices=encoders.BACKENDS,
        default="auto",
        help="library that encodes; the tokens are the same (default: the fastest that is installed)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="number of processes (default: the cores that this process may use)",
    )
    parser.add_argument(
        "--unit-mb", type=int, metavar="MB", help="size of a unit of work (default: a 64th of the input, from 8 to 256)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=GiB, metavar="N", help="at most this many tokens per shard (default: 2**30)"
    )
    parser.add_argument("--task", type=int, default=0, metavar="I", help="make share I of --tasks, from 0 (default: 0)")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="tasks that share the work (default: 1)")


if __name__ == "__main__":
    cli.run(main, os._exit)
