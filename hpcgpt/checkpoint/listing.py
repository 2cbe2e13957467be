"""What there is: a row for each checkpoint of a run, also of those that were set aside.

No torch in here.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import go_back, layout


def rows(checkpoints: Path) -> list[dict[str, Any]]:
    """List the checkpoints, the newest first, then those that were set aside; checksums are not checked."""
    found = [row(path) for path in layout.found(checkpoints)]
    found += [_set_aside(path) for path in layout.damaged(checkpoints)]
    return found + [row(path) | {"name": f"{path.parent.name}/{path.name}"} for path in go_back.kept_aside(checkpoints)]


def kept_bytes(checkpoints: Path) -> int:
    """Return the bytes of the checkpoints that a save counts: it keeps them, or they make room for newer ones.

    Those that were set aside stay beside them. What another process removes meanwhile is left out.

    Raises:
        OSError: the folder exists, but cannot be read.
    """
    total = 0
    for path in layout.found(checkpoints):
        with suppress(FileNotFoundError, NotADirectoryError):
            total += sum(file.stat().st_size for file in layout.entries(path))
    return total


def row(path: Path, problem: str | None = None) -> dict[str, Any]:
    """Return the row of a checkpoint. `problem`: what `layout.verify` returned; None if it was not called."""
    whole = "whole" if problem == "" else "sizes fit"
    problem = layout.check_structure(path) if problem is None else problem
    found: dict[str, Any] = {"name": path.name, "step": layout.step_of(path), "problem": problem}
    found |= {"state": "damaged" if problem else whole, "bytes": None, "val_loss": None, "world_size": None}
    found["age_s"] = time.time() - path.stat().st_mtime
    if not problem:
        found["bytes"] = sum(file["bytes"] for file in layout.read_files(path).values())
        found["val_loss"], found["world_size"] = layout.val_loss(path), layout.read_state(path).world_size
    return found


def _set_aside(path: Path) -> dict[str, Any]:
    """Return the row of a damaged checkpoint that was set aside."""
    try:
        problem = (path / "REASON.txt").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        problem = "no reason is kept"
    found = dict.fromkeys(("bytes", "val_loss", "world_size")) | {"name": path.name, "problem": problem}
    return found | {"step": None, "state": "set aside", "age_s": time.time() - path.stat().st_mtime}
