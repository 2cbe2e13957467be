"""Make the data set of a plan, or one task's share of it: encode its units, and finish it when none is left.

The units are made by worker processes (``data_prep.pipeline.workers``). The task that finds all of them finished writes
the manifest (``data_prep.pipeline.finalize``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.encode import encoders
from data_prep.encode.encoders import Backend
from data_prep.encode.interface import Encoder
from data_prep.pipeline import finalize, task_share, unit, workers
from data_prep.pipeline.plan import PrepPlan, claim, is_complete
from data_prep.pipeline.progress import ProgressBar
from data_prep.pipeline.task_share import TaskShare
from data_prep.pipeline.workers import Team, WorkerConfig
from data_prep.text import accounting
from hpcgpt.data.shard_format import Manifest
from hpcgpt.distributed import world
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.storage import lease
from hpcgpt.tokenizer import save_load

# Kept until the process ends: to free the tables of an encoder takes 15 ms.
_kept: list[Encoder] = []
_LARGE = 1_000_000_000  # bytes of input, for which it is worth printing why a slower encoder is used


def make(plan: PrepPlan, out: Path, processes: int, backend: Backend, share: TaskShare) -> None:
    """Make one task's share of the data set that `plan` describes; if no unit is left, finish the data set.

    Raises:
        UserError: `out` holds something else, another process makes the same units, or a document cannot be read.
        OSError: a file could not be written. Finished units stay, and a rerun continues from there.
    """
    started_at = time.monotonic()
    if claim(out, plan):
        print(f"{out} is complete already, with these inputs and options: nothing to do")
        return
    unfinished = _unfinished(plan, out, share)
    encoder = encoders.choose(plan.options.tokenizer, backend)
    if encoder.fallback_reason and _input_bytes(plan, unfinished) > _LARGE:
        print(encoder.fallback_reason, flush=True)
    _kept[:] = [encoder]
    config = WorkerConfig(out, plan.options, encoder, plan.plan_hash)
    # In this order, because the lease has a thread: see `workers`.
    with workers.started(config, min(processes, len(unfinished))) as team:
        with task_share.acquire(out, share):
            save_load.save(plan.options.tokenizer, out / "tokenizer")
            _make_units(plan, out, team, share)
        _end(plan, out, started_at)


def _end(plan: PrepPlan, out: Path, started_at: float) -> None:
    """Finish the data set if no unit is left, and print what there is."""
    left = len(plan.units) - len(unit.finished(out))
    # In this order, because the units' folders are removed after the manifest is written.
    if is_complete(out):
        print(f"{out} is complete")
    elif left:
        print(f"this share is finished; {left} of {len(plan.units)} units are left for other tasks")
    elif manifest := _finalize(plan, out):
        _print_summary(out, manifest, plan, time.monotonic() - started_at)


def _unfinished(plan: PrepPlan, out: Path, share: TaskShare) -> list[int]:
    """Return the numbers of the units of a share that are left to be made."""
    finished = unit.finished(out)
    return [number for number in range(share.task, len(plan.units), share.tasks) if number not in finished]


def _input_bytes(plan: PrepPlan, numbers: Sequence[int]) -> int:
    return sum(part.stop - part.start for number in numbers for part in plan.units[number])


def _make_units(plan: PrepPlan, out: Path, team: Team, share: TaskShare) -> None:
    count = len(range(share.task, len(plan.units), share.tasks))
    todo = _unfinished(plan, out, share)
    # In this order, because the units' folders are removed after the manifest is written.
    if is_complete(out):
        return  # another task has finished the data set since `claim`
    if len(todo) < count:
        print(f"{count - len(todo)} of {count} units are finished already")
    unit.remove_leftovers(out, todo, plan.plan_hash)
    compressed = any(
        part.file.compression or part.file.kind == "parquet" for number in todo for part in plan.units[number]
    )
    with ProgressBar(_input_bytes(plan, todo), compressed) as progress:
        workers.run(team, [(number, plan.units[number]) for number in todo], progress)


def _finalize(plan: PrepPlan, out: Path) -> Manifest | None:
    """Finish the data set; return None if another task does, or did."""
    try:
        # This name is on disk, so it stays: a task that started with an older version may hold the lease.
        finalize_lease = lease.acquire(out / "prep" / "placing", world.job_start(), task_share.REMEDY)
    except ValueError as error:
        print(f"all units are finished, and another task writes the manifest: {error}")
        return None
    with finalize_lease:
        if not is_complete(out):
            return finalize.finalize(out, plan)
        print(f"{out} is complete")
        return None


def _print_summary(out: Path, manifest: Manifest, plan: PrepPlan, elapsed_s: float) -> None:
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        tokens = sum(s.tokens for s in of)
        print(
            f"{name:5}  {tokens:,} tokens in {counted(sum(s.documents for s in of), 'document')}, "
            f"{counted(len(of), 'shard')}, "
            f"{sum(s.characters for s in of) / tokens:.2f} characters and "
            f"{sum(s.text_bytes for s in of) / tokens:.2f} bytes per token"
        )
    all_tokens = sum(shard.tokens for shard in manifest.shards)
    if left_out := accounting.left_out(manifest.counts):
        print(f"left out: {left_out}")
    accounting.print_changes(manifest)
    if plan.val_files and "val" not in manifest.splits:
        streams.warn("no document of --val is left for validation: train with --eval.every 0, or look at these files")
    if plan.options.val_fraction and "val" not in manifest.splits:
        documents = sum(shard.documents for shard in manifest.shards)
        streams.warn(
            f"no document was held out for validation ({counted(documents, 'document')}, --val-fraction "
            f"{plan.options.val_fraction}): train with --eval.every 0, or make shards with a larger fraction in "
            "another --out"
        )
    print(
        f"{out}: complete in {elapsed_s:.1f} s, {all_tokens / elapsed_s / 1e6:.2f} Mtok/s "
        f"(digest {manifest.digest[:12]})"
    )
