"""Make a data set of finished units: give the shards their final names, and write the manifest.

Shards are numbered in the order of the units. Every step can be interrupted and repeated: a file is renamed if it
still has its old name, and the manifest is written last.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

from data_prep.pipeline import dedup, holdout, unit
from data_prep.pipeline.plan import PrepPlan
from data_prep.pipeline.unit import UnitRecord
from data_prep.text import accounting, unread
from data_prep.text.options import Skipped
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Manifest, Shard
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic


def finalize(out: Path, plan: PrepPlan) -> Manifest:
    """Make the data set after all units are finished.

    Raises:
        UserError: no document is left for training, or a file that this command did not make is in the way.
    """
    records = [unit.read_record(out, number) for number in range(len(plan.units))]
    kept, removed = [record.shards for record in records], 0
    if plan.options.dedup:
        kept, removed = dedup.remove(out, records, plan.options.width)
    counts = _counts(records, removed, plan.skipped)
    if not any(shard.split == "train" for of_unit in kept for shard in of_unit):
        held_out = sum(shard.documents for of_unit in kept for shard in of_unit)
        if held_out and not plan.val_files:
            raise UserError(f"no document is left for training ({held_out} for validation): lower --val-fraction")
        why = accounting.left_out(counts) or "the inputs have none"
        raise UserError(
            f"no document is left for training: {why}; look at the inputs, or choose others and another --out"
        )
    _write_skipped(out, plan.skipped, records)
    shards = _move_shards(out, kept)
    atomic.sync_folder(out)
    manifest = shard_format.write_manifest(
        out,
        plan.options.dtype,
        plan.options.tokenizer.describe(),
        [{"name": file.name, "bytes": file.bytes} for file in plan.files]
        + [{"name": file.name, "bytes": file.bytes, "split": "val"} for file in plan.val_files],
        holdout.OWN_FILES_RULE if plan.val_files else holdout.rule(plan.options.val_fraction),
        counts,
        sorted(shards, key=lambda shard: shard.name),
        unread=unread.for_manifest(plan.unread),
    )
    _remove_unit_folders(out, records)
    return manifest


def _write_skipped(out: Path, whole_files: list[Skipped], records: list[UnitRecord]) -> None:
    """Write skipped.jsonl, if there is anything to list. The rows of one unit at a time are in memory."""
    listed = [number for number, record in enumerate(records) if record.skipped_rows]
    if not whole_files and not listed:
        return
    with atomic.writing(out / "skipped.jsonl") as file:
        for rows in chain([whole_files], (unit.read_skipped(out, number) for number in listed)):
            for row in rows:
                file.write((json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n").encode())


def _counts(records: list[UnitRecord], duplicates: int, whole_files: list[Skipped]) -> dict[str, int]:
    """Count what was left out or changed, by reason; see `data_prep.text.accounting`."""
    counts = {
        "too_short": sum(record.too_short for record in records),
        "duplicates": duplicates,
        "skipped": sum(row.count for row in whole_files) + sum(record.skipped for record in records),
    }
    rest: Counter[str] = Counter()
    for record in records:
        rest.update(record.counts)
    return counts | {key: count for key, count in sorted(rest.items()) if count}


def _move_shards(out: Path, kept: list[list[Shard]]) -> list[Shard]:
    """Move the shards of all units into `out`; return them with their final names."""
    moved: list[Shard] = []
    numbers = {"train": 0, "val": 0}
    for number, of_unit in enumerate(kept):
        for shard in of_unit:
            name = f"{shard.split}_{numbers[shard.split]:06d}"
            numbers[shard.split] += 1
            for suffix in (".idx", ".bin"):
                _move(unit.folder(out, number) / f"{shard.name}{suffix}", out / f"{name}{suffix}")
            moved.append(dataclasses.replace(shard, name=name))
    return moved


def _move(source: Path, target: Path) -> None:
    if source.exists():
        if target.exists():
            raise UserError(f"{target} is in the way, and was not made by this command: move it somewhere else")
        source.rename(target)
    elif not target.exists():
        raise UserError(f"{target} is missing, and so is {source}: remove the folder and make the shards again")


def _remove_unit_folders(out: Path, records: list[UnitRecord]) -> None:
    """Remove the units' folders: what their records say is in the manifest now."""
    for number, record in enumerate(records):
        folder = unit.folder(out, number)
        for name in ("record.json", *dedup.names(record)):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        (out / "prep" / "units").rmdir()
