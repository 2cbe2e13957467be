"""Text -> token shards: ``python -m data_prep.make_shards INPUT... --out DIR``.

The inputs are cut into units (``data_prep.text.inputs``), each unit is made and kept as a whole
(``data_prep.pipeline.unit``), and when the last one is finished the shards get their names and the manifest
(``data_prep.pipeline.finalize``)::

    DIR/
      prep/plan.json            inputs, tokenizer and options; written first
      prep/units/000000/        unit 0 is finished; gone when all are
      train_000000.bin ...      see hpcgpt.data.shard_format
      tokenizer/
      skipped.jsonl             what was set aside, if anything was
      manifest.json             written last

A rerun skips the finished units, so a killed run goes on where it stopped. Many machines may share the
work: task i of n makes units i, i+n, ..., and whoever finishes last writes the manifest. What comes out
depends on the plan alone, not on the number of workers or tasks, nor on what was killed. A folder with
another plan, or with files that are none of ours, is refused; nothing is deleted that is not ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.encode import find_tokenizer, vocabulary
from data_prep.encode.find_tokenizer import Backend
from data_prep.pipeline import finalize, task_share, unit, workers
from data_prep.pipeline.plan import Plan, Recipe, check_ours, claim
from data_prep.pipeline.progress import Progress
from data_prep.pipeline.task_share import Share
from data_prep.pipeline.workers import Job
from data_prep.text import accounting, inputs, standard_input, unread
from data_prep.text import options as text_options
from data_prep.text.inputs import Source
from data_prep.text.options import Skipped
from data_prep.text.unread import Unread
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Manifest
from hpcgpt.distributed import world
from hpcgpt.errors import UserError
from hpcgpt.storage import lease
from hpcgpt.tokenizer import save_load

GiB = 1 << 30
_LARGE = 1_000_000_000  # bytes of input
# What a worker imports: what this file does, for it is run again there, and what gigatoken needs for its results.
_PRELOADED = ("argparse", "data_prep.encode.vocabulary", "data_prep.pipeline.finalize", "data_prep.pipeline.progress",
              "data_prep.pipeline.task_share")  # fmt: skip
_PRELOADED_FAST = ("gigatoken.gigatoken_rs", "awkward")


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    _check(options)
    if options.workers > 1:
        workers.prepare(*_PRELOADED, *(() if options.backend == "tiktoken" else _PRELOADED_FAST))
    words = vocabulary.find(options.tokenizer, options.end_of_text)
    width = shard_format.WIDTHS[options.dtype]
    if words.vocab_size > width.most_ids:
        raise UserError(
            f"tokenizer {words.name} has {words.vocab_size:,} ids, but {width.name} shards hold {width.most_ids:,} at "
            "most: pass --dtype uint32 (twice the disk space), take a smaller one, such as gpt2, or train one with "
            "`python -m data_prep.train_tokenizer`"
        )
    how = text_options.asked(options)
    recipe = Recipe(
        tokenizer=words,
        reading=how,
        dtype=options.dtype,
        val_fraction=options.val_fraction,
        min_characters=options.min_characters,
        dedup=options.dedup == "exact",
        shard_tokens=options.shard_tokens,
    )
    out = Path(paths.expand(options.out, "--out"))
    given = [str(_standard_input(out, options)) if name == "-" else name for name in options.INPUT]
    skipped: list[Skipped] = []
    others: list[Unread] = []
    sources = inputs.find(given, skipped if how.on_bad_input == "skip" else None, others, how.text_key)
    unread.check(others, options.ignore_other_files)
    unit_bytes = options.unit_mb * 1_000_000 if options.unit_mb else _unit_bytes(sources)
    plan = Plan(recipe, sources, inputs.units(sources, unit_bytes, how), unit_bytes, skipped, others)
    make(plan, out, options.workers, options.backend, Share(options.task, options.tasks))
    return 0


def make(plan: Plan, out: Path, processes: int, backend: Backend, mine: Share) -> None:
    """Make this task's share of the data set that `plan` describes in `out`, and finish it if nothing is left.

    Raises:
        UserError: the folder belongs to something else or somebody else, or a document cannot be read.
        OSError: a file could not be written. What was finished stays, and a rerun goes on from there.
    """
    started_at = time.monotonic()
    if claim(out, plan):
        print(f"{out} is complete already, with these inputs and options: nothing to do")
        return
    with task_share.taken(out, mine):
        save_load.save(plan.recipe.tokenizer, out / "tokenizer")
        _make_units(plan, out, processes, backend, mine)
    left = [number for number in range(len(plan.units)) if not unit.folder(out, number).is_dir()]
    # In this order: whoever writes the manifest removes the units' folders after it.
    if (out / "manifest.json").is_file():
        print(f"{out} is complete")
    elif left:
        print(f"this share is finished; {len(left)} of {len(plan.units)} units are left for other tasks")
    elif manifest := _place(plan, out):
        _summary(out, manifest, plan, time.monotonic() - started_at)


def _unit_bytes(sources: Sequence[Source]) -> int:
    """Many units, so that workers that began together end together, but none that takes longer to be flushed to the
    disk than to be made, and no more files than need be: a 64th of the input, from 8 to 256 MB."""
    return min(max(-(-sum(source.bytes for source in sources) // 64), 8_000_000), 256_000_000)


def _standard_input(out: Path, options: argparse.Namespace) -> Path:
    """The copy of standard input, which lies in `out`: so a rerun goes on with it."""
    if options.tasks > 1 or options.INPUT.count("-") > 1:
        raise UserError("standard input can be read once only: name files where tasks share the work")
    check_ours(out)
    prep = out / "prep"
    if (prep / "plan.json").is_file() and not any(prep.glob("stdin.*")):
        raise UserError(f"{out} holds shards that were made of other inputs: choose another --out")
    return standard_input.spool(sys.stdin.buffer, prep)


def _make_units(plan: Plan, out: Path, processes: int, backend: Backend, mine: Share) -> None:
    share_of = range(mine.task, len(plan.units), mine.tasks)
    todo = [number for number in share_of if not unit.folder(out, number).is_dir()]
    if len(todo) < len(share_of):
        print(f"{len(share_of) - len(todo)} of {len(share_of)} units are finished already")
    for number in todo:
        unit.remove_leftovers(out, number, plan.mark)
    pieces = [piece for number in todo for piece in plan.units[number]]
    input_bytes = sum(piece.stop - piece.start for piece in pieces)
    job = Job(out, plan.recipe, backend, plan.mark, large=input_bytes > _LARGE)
    compressed = any(piece.source.packing or piece.source.kind == "parquet" for piece in pieces)
    with Progress(input_bytes, compressed) as progress:
        workers.run(job, [(number, plan.units[number]) for number in todo], processes, progress)


def _place(plan: Plan, out: Path) -> Manifest | None:
    """The finished data set; None if another task finishes it, or did."""
    try:
        merging = lease.acquire(out / "prep" / "placing", world.job_attempt())
    except ValueError as error:
        print(f"all units are finished, and another task writes the manifest: {error}")
        return None
    try:
        if not (out / "manifest.json").is_file():
            return finalize.place(out, plan)
        print(f"{out} is complete")
        return None
    finally:
        merging.release()


def _summary(out: Path, manifest: Manifest, plan: Plan, elapsed_s: float) -> None:
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        tokens = sum(s.tokens for s in of)
        print(
            f"{name:5}  {tokens:,} tokens in {sum(s.documents for s in of):,} documents, {len(of)} shards, "
            f"{sum(s.characters for s in of) / tokens:.2f} characters and "
            f"{sum(s.text_bytes for s in of) / tokens:.2f} bytes a token"
        )
    all_tokens = sum(shard.tokens for shard in manifest.shards)
    if left_out := accounting.left_out(manifest.counts):
        print(f"left out: {left_out}")
    if changed := accounting.changed(manifest.counts, all_tokens):
        print(f"changed: {changed}")
    if manifest.unread:
        print(f"not read: {unread.told(manifest.unread)}")
    if warning := accounting.unknown_warning(manifest.counts, all_tokens):
        print(f"warning: {warning}", file=sys.stderr)
    if plan.recipe.val_fraction and "val" not in manifest.splits:
        documents = sum(shard.documents for shard in manifest.shards)
        print(
            f"warning: no document fell into validation ({documents:,} documents, --val-fraction "
            f"{plan.recipe.val_fraction}): train with --eval.every 0, or make shards with a larger fraction in "
            "another --out",
            file=sys.stderr,
        )
    print(
        f"{out}: complete in {elapsed_s:.1f} s, {all_tokens / elapsed_s / 1e6:.2f} Mtok/s "
        f"(digest {manifest.digest[:12]})"
    )


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: expected 0 or more, and less than 1")
    if options.workers < 1 or (options.unit_mb is not None and options.unit_mb < 1):
        raise UserError("--workers and --unit-mb must be at least 1")
    if not 1 <= options.shard_tokens <= shard_format.MOST_TOKENS:
        raise UserError(f"--shard-tokens {options.shard_tokens}: expected 1 to {shard_format.MOST_TOKENS}")
    if not 0 <= options.task < options.tasks:
        raise UserError(
            f"--task {options.task} of --tasks {options.tasks}: tasks count from 0, up to {options.tasks - 1}"
        )
    if options.min_characters < 0:
        raise UserError(f"--min-characters {options.min_characters}: expected 0 or more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.make_shards", description="Text -> token shards.")
    parser.add_argument(
        "INPUT",
        nargs="+",
        help="files ending in .txt (a document each), .jsonl or .ndjson (a document a line), all also with .gz, .zst, "
        ".xz or .bz2, or .parquet or .arrow (a document a row); folders of them; patterns in quotes, as '**/*.txt'; - "
        "for standard input",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        help="gpt2, another encoding of tiktoken's, a folder made by train_tokenizer, a Hugging Face tokenizer.json or "
        "its folder (default: gpt2)",
    )
    parser.add_argument(
        "--end-of-text", default="", metavar="TOKEN", help="Hugging Face: the special token between documents"
    )
    text_options.add_options(parser)
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents held out for validation (default: 0.01)",
    )
    parser.add_argument(
        "--min-characters", type=int, default=0, metavar="N", help="leave shorter documents out (default: 0)"
    )
    parser.add_argument(
        "--dedup", choices=("none", "exact"), default="none", help="of equal documents keep the first (default: none)"
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(shard_format.WIDTHS),
        default="uint16",
        help="uint32 for above 65,536 ids (default: uint16)",
    )
    _add_work_options(parser)
    return parser


def _add_work_options(parser: argparse.ArgumentParser) -> None:
    """How the work is done, which changes no byte of the shards but for where one ends."""
    parser.add_argument(
        "--backend",
        choices=find_tokenizer.BACKENDS,
        default="auto",
        help="what encodes; the tokens are the same (default: the fastest that is installed)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores that this process may use)",
    )
    parser.add_argument(
        "--unit-mb", type=int, metavar="MB", help="text a unit of work (default: a 64th of the input, from 8 to 256)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=GiB, metavar="N", help="most tokens in a shard (default: 2**30)"
    )
    parser.add_argument("--task", type=int, default=0, metavar="I", help="make share I of --tasks (default: 0)")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="tasks that share the work (default: 1)")


if __name__ == "__main__":
    cli.run(main)
