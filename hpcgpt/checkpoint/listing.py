"""What there is: a row for each checkpoint of a run, also of those that were set aside.

No torch in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import go_back, layout
from hpcgpt.errors import sentence


def rows(checkpoints: Path) -> list[dict[str, Any]]:
    """List the checkpoints, the newest first, then those that were set aside; checksums are not checked."""
    found = [_row(path, layout.check_structure, "sizes fit") for path in layout.found(checkpoints)]
    found += [_set_aside(path) for path in layout.damaged(checkpoints)]
    for path in go_back.kept_aside(checkpoints):
        if kept := _row(path, layout.check_structure, "sizes fit"):
            found.append(kept | {"name": f"{path.parent.name}/{path.name}"})
    return list(filter(None, found))


def verified(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of these checkpoints, with checksums, each as soon as it has been read."""
    yield from filter(None, (_row(path, layout.verify, "whole") for path in paths))


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


def _row(path: Path, check: Callable[[Path], str], sound: str) -> dict[str, Any] | None:
    """Return the row of a checkpoint, whose state is `sound` if `check` finds no problem.

    None if it has been removed, as old ones are while a run is trained. One that cannot be read has a row, too.
    """
    found: dict[str, Any] = {"name": path.name, "step": layout.step_of(path), "problem": "", "state": sound}
    found |= dict.fromkeys(("bytes", "val_loss", "world_size"))
    try:
        found["age_s"] = time.time() - path.stat().st_mtime
        problem = check(path)
        if problem:
            path.stat()  # is it still there?
            return found | {"problem": problem, "state": "damaged"}
        found["bytes"] = sum(file["bytes"] for file in layout.read_files(path).values())
        found["val_loss"], found["world_size"] = layout.val_loss(path), layout.read_state(path).world_size
    except OSError as error:
        if not path.exists():
            return None
        return {"age_s": None} | found | {"problem": f"cannot be read: {sentence(error)}", "state": "unknown"}
    return found


def _set_aside(path: Path) -> dict[str, Any] | None:
    """Return the row of a damaged checkpoint that was set aside; None if it has been removed."""
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return None
    try:
        problem = (path / "REASON.txt").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        problem = "no reason is kept"
    found = dict.fromkeys(("bytes", "val_loss", "world_size")) | {"name": path.name, "problem": problem}
    return found | {"step": None, "state": "set aside", "age_s": age_s}
