"""The plan of a data set, and the folder in which it is made.

A plan holds everything that the output depends on, and nothing else: not the number of workers, not the encoder
backend, not where the command runs. It is written first, as ``DIR/prep/plan.json``; a later command with a different
plan is refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from data_prep.text.inputs import InputFile, Unit
from data_prep.text.options import Skipped, TextOptions
from data_prep.text.unread import UnreadFile
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Width
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class ShardOptions:
    """How text becomes tokens in shards.

    With --val, the units from `val_units_from` on are the validation split; else `val_fraction` of the documents is.
    """

    tokenizer: Tokenizer
    text: TextOptions
    dtype: str
    val_fraction: float
    min_characters: int
    dedup: bool
    shard_tokens: int
    val_units_from: int | None = None

    def val_fraction_of(self, unit: int) -> float:
        """Return the fraction of the documents of a unit that is held out for validation."""
        if self.val_units_from is None:
            return self.val_fraction
        return 1.0 if unit >= self.val_units_from else 0.0

    @property
    def width(self) -> Width:
        return shard_format.WIDTHS[self.dtype]


@dataclass(frozen=True)
class PrepPlan:
    """What is to be made: from which files, with which options, in which units of work."""

    options: ShardOptions
    files: list[InputFile]
    units: list[Unit]
    unit_bytes: int
    skipped: list[Skipped] = field(default_factory=list)  # whole files, skipped while finding them; not in plan.json
    unread: list[UnreadFile] = field(default_factory=list)  # found, but not to be read; not in plan.json
    val_files: list[InputFile] = field(default_factory=list)  # those of --val, of which the last units are

    @cached_property
    def as_json(self) -> bytes:
        """The content of plan.json."""
        body = {
            "inputs": _rows(self.files),
            "tokenizer": self.options.tokenizer.fingerprint,
            **asdict(self.options.text),
            "dtype": self.options.dtype,
            "val_fraction": self.options.val_fraction,
            "min_characters": self.options.min_characters,
            "dedup": self.options.dedup,
            "shard_tokens": self.options.shard_tokens,
            "unit_bytes": self.unit_bytes,
        }
        if self.val_files:
            body["val_inputs"] = _rows(self.val_files)
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()

    @cached_property
    def plan_hash(self) -> str:
        """Eight hexadecimal digits that identify this plan, for the names of its temporary folders."""
        return sha256(self.as_json).hexdigest()[:8]


def _rows(files: list[InputFile]) -> list[dict[str, Any]]:
    return [{"name": file.name, "bytes": file.bytes, "modified_ns": file.modified_ns} for file in files]


def is_complete(out: Path) -> bool:
    """Return whether the folder has a manifest, so that nothing is left to be made.

    The folder is listed, as that asks an NFS server for its current state. A look for the file could be answered by
    what this node remembers, for a minute after another node has written it (see `hpcgpt.storage.lease`).
    """
    try:
        return "manifest.json" in os.listdir(out)
    except (FileNotFoundError, NotADirectoryError):
        return False


def claim(out: Path, plan: PrepPlan) -> bool:
    """Make `out` the folder of `plan`; return whether the data set in it is complete already.

    Raises:
        UserError: it belongs to another plan, or holds something else.
    """
    path, complete = out / "prep" / "plan.json", is_complete(out)
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
    """Raise UserError if the folder holds something that this command did not make."""
    # In this order: between the two checks another task may write the plan, and then other files.
    if _has_other_files(out) and not (out / "prep" / "plan.json").is_file():
        raise UserError(f"{out} is not empty, and what is in it was not made by this command: choose another --out")


def _has_other_files(out: Path) -> bool:
    """Return whether `out` holds files other than those of a command that ended before it wrote its plan."""
    prep = out / "prep"

    def is_own(path: Path) -> bool:
        return path == prep or (path.parent == prep and path.name.startswith((".plan.json.", "stdin.", ".stdin.")))

    return out.is_dir() and not all(is_own(path) for path in out.rglob("*"))


def _differences(before: dict[str, Any], now: dict[str, Any], complete: bool) -> list[str]:
    """Return the keys that differ between two plans. Times of the inputs matter only until the data set is complete."""
    if complete:
        for plan in (before, now):
            for key in ("inputs", "val_inputs"):
                if key in plan:
                    plan[key] = [{**row, "modified_ns": 0} for row in plan[key]]
    return [key for key in {**now, "val_inputs": None} if before.get(key) != now.get(key)]
