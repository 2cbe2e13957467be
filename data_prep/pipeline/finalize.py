"""From finished units to a data set: shards get their final names, and the manifest is written.

Shards are numbered through, in the order of the units. Each step can be cut off and done again: a file
is renamed if it is still under its old name, and the manifest comes last.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from contextlib import suppress
from pathlib import Path

from data_prep.pipeline import dedup, holdout, unit
from data_prep.pipeline.plan import Plan
from data_prep.pipeline.unit import Record
from data_prep.text import accounting, unread
from data_prep.text.options import Skipped
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Manifest, Shard
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic


def place(out: Path, plan: Plan) -> Manifest:
    """The data set, of which all units are finished.

    Raises:
        UserError: no document is left for training, or a file that is none of ours is in the way.
    """
    records = [unit.read_record(out, number) for number in range(len(plan.units))]
    kept, removed = [record.shards for record in records], 0
    if plan.recipe.dedup:
        kept, removed = dedup.remove(out, records, plan.recipe.width)
    skipped = [*plan.skipped, *(row for record in records for row in record.skipped)]
    counts = _counts(records, removed, skipped)
    if not any(shard.split == "train" for of_unit in kept for shard in of_unit):
        held_out = sum(shard.documents for of_unit in kept for shard in of_unit)
        if held_out:
            raise UserError(f"no document is left for training ({held_out} for validation): lower --val-fraction")
        why = accounting.left_out(counts) or "the inputs have none"
        raise UserError(
            f"no document is left for training: {why}; look at the inputs, or choose others and another --out"
        )
    if skipped:
        atomic.write(
            out / "skipped.jsonl",
            "".join(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in skipped).encode(),
        )
    placed = list(_placed(out, kept))
    atomic.sync_folder(out)
    manifest = shard_format.write_manifest(
        out,
        plan.recipe.dtype,
        plan.recipe.tokenizer.describe(),
        [{"name": source.name, "bytes": source.bytes} for source in plan.sources],
        holdout.rule(plan.recipe.val_fraction),
        counts,
        sorted(placed, key=lambda shard: shard.name),
        unread=unread.listed(plan.unread),
    )
    _clean(out, records)
    return manifest


def _counts(records: list[Record], duplicates: int, skipped: list[Skipped]) -> dict[str, int]:
    """What was left out or changed, by reason; see `data_prep.text.accounting`."""
    counts = {
        "too_short": sum(record.too_short for record in records),
        "duplicates": duplicates,
        "skipped": sum(row.count for row in skipped),
    }
    rest: Counter[str] = Counter()
    for record in records:
        rest.update(record.counts)
    return counts | {key: count for key, count in sorted(rest.items()) if count}


def _placed(out: Path, kept: list[list[Shard]]) -> list[Shard]:
    placed: list[Shard] = []
    numbers = {"train": 0, "val": 0}
    for number, of_unit in enumerate(kept):
        for shard in of_unit:
            name = f"{shard.split}_{numbers[shard.split]:06d}"
            numbers[shard.split] += 1
            for suffix in (".idx", ".bin"):
                _move(unit.folder(out, number) / f"{shard.name}{suffix}", out / f"{name}{suffix}")
            placed.append(dataclasses.replace(shard, name=name))
    return placed


def _move(source: Path, target: Path) -> None:
    if source.exists():
        if target.exists():
            raise UserError(f"{target} is in the way, and was not made by this command: move it somewhere else")
        source.rename(target)
    elif not target.exists():
        raise UserError(f"{target} is missing, and so is {source}: remove the folder and make the shards again")


def _clean(out: Path, records: list[Record]) -> None:
    """What the units' folders held is in the manifest now."""
    for number, record in enumerate(records):
        folder = unit.folder(out, number)
        for name in ("record.json", *dedup.names(record)):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        (out / "prep" / "units").rmdir()
