"""What a preparation is to make, and the folder that it is made in.

A plan holds everything that the output depends on, and nothing else: not the number of workers, not the
backend that encodes, not where the command runs. It is written first, as ``DIR/prep/plan.json``; whoever
comes later with another one is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_prep.text.inputs import Source, Unit
from data_prep.text.options import Reading, Skipped
from data_prep.text.unread import Unread
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Width
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class Recipe:
    """How a text becomes tokens in a shard: what a worker has to know."""

    tokenizer: Tokenizer
    reading: Reading
    dtype: str
    val_fraction: float
    min_characters: int
    dedup: bool
    shard_tokens: int

    @property
    def width(self) -> Width:
        return shard_format.WIDTHS[self.dtype]


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    sources: list[Source]
    units: list[Unit]
    unit_bytes: int
    skipped: list[Skipped] = field(default_factory=list)  # whole files, set aside before there were units
    unread: list[Unread] = field(default_factory=list)  # found beside the sources; no part of what is planned

    @cached_property
    def as_json(self) -> bytes:
        body = {
            "inputs": [{"name": s.name, "bytes": s.bytes, "modified_ns": s.modified_ns} for s in self.sources],
            "tokenizer": self.recipe.tokenizer.fingerprint,
            **asdict(self.recipe.reading),
            "dtype": self.recipe.dtype,
            "val_fraction": self.recipe.val_fraction,
            "min_characters": self.recipe.min_characters,
            "dedup": self.recipe.dedup,
            "shard_tokens": self.recipe.shard_tokens,
            "unit_bytes": self.unit_bytes,
        }
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()

    @cached_property
    def mark(self) -> str:
        """Eight letters that name this plan: in the names of files that only it leaves behind."""
        return sha256(self.as_json).hexdigest()[:8]


def claim(out: Path, plan: Plan) -> bool:
    """Make `out` the folder of `plan`; True if the data set in it is complete already.

    Raises:
        UserError: it belongs to another plan, or to something else.
    """
    path, complete = out / "prep" / "plan.json", (out / "manifest.json").is_file()
    check_ours(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not atomic.create(path, plan.as_json):
        try:
            before = json.loads(path.read_bytes())
            differences = _differences(before, json.loads(plan.as_json), complete)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f"{path} is damaged: choose another --out, or remove that folder yourself") from None
        if differences:
            raise UserError(
                f"{out} holds shards that were made differently ({', '.join(differences)} changed): choose another "
                "--out, or remove that folder yourself"
            )
    return complete


def check_ours(out: Path) -> None:
    """Raises UserError if there is something in the folder that this command did not make."""
    # In this order: between two looks another task may write the plan, and files that follow it.
    if _foreign(out) and not (out / "prep" / "plan.json").is_file():
        raise UserError(f"{out} is not empty, and what is in it was not made by this command: choose another --out")


def _foreign(out: Path) -> bool:
    """Is there anything in `out` but what a start leaves that ended before its plan was written?"""
    prep = out / "prep"

    def ours(path: Path) -> bool:
        return path == prep or (path.parent == prep and path.name.startswith((".plan.json.", "stdin.")))

    return out.is_dir() and not all(ours(path) for path in out.rglob("*"))


def _differences(before: dict[str, Any], now: dict[str, Any], complete: bool) -> list[str]:
    """What differs between two plans. How old the inputs are matters only while units are still to be made."""
    if complete:
        for plan in (before, now):
            plan["inputs"] = [{**row, "modified_ns": 0} for row in plan["inputs"]]
    return [key for key in now if before.get(key) != now[key]]
