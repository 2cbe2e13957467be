"""Which checkpoints go: old ones once newer ones have been read back, and what ended attempts left half done.

What stays are the `keep_last` newest valid ones, every `keep_every`-th step, and the one with the smallest
validation loss. Only checkpoints whose checksums hold count, so an old one never goes for a damaged newer one's sake.

No torch in here.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

from hpcgpt import checkpoint, config
from hpcgpt.generation import Generation


def retire(checkpoints: Path, keep: config.Checkpoint, held: Generation, verified: set[str]) -> list[Path]:
    """Remove what is not to stay; returns those that went.

    `verified` has the names that this process has read back; it is added to. Damaged ones are set aside.

    Raises:
        OSError: one could not be read or removed.
        ValueError: there is one of another format version.
    """
    whole: list[Path] = []
    waiting = checkpoint.found(checkpoints)
    while waiting and len(whole) < keep.keep_last:
        path = waiting.pop(0)
        problem = "" if path.name in verified else checkpoint.verify(path)
        if problem:
            held.check()
            checkpoint.set_aside(path, problem, held.number)
        else:
            verified.add(path.name)
            whole.append(path)
    best = _best([*whole, *waiting], verified) if keep.keep_best else None
    going = [
        path
        for path in waiting
        if path != best and not (keep.keep_every and checkpoint.step_of(path) % keep.keep_every == 0)
    ]
    for path in going:
        held.check()
        # Out of sight first: a removal that is cut short must not leave a checkpoint without its files.
        hidden = path.with_name(f".{path.name}.g{held.number:04d}.removed")
        path.rename(hidden)
        shutil.rmtree(hidden)
    return going


def clean(checkpoints: Path, held: Generation) -> None:
    """Take away what earlier generations left half written or half removed.

    Each is renamed first. An orphan of an earlier generation that is about to give its checkpoint its name finds it
    gone, or was quicker, and then its checkpoint is there before ours is chosen. What it begins later fails its
    own look for a newer generation. So none of its checkpoints ever follows one of ours.
    """
    for path in sorted(checkpoint.entries(checkpoints), reverse=True):  # a .gone before what would become it
        parts = re.fullmatch(r"(\.step_\d+\.g(\d+)\.(tmp|removed))(\.gone)?", path.name)
        if parts and int(parts[2]) < held.number:
            gone = path.with_name(f"{parts[1]}.gone")
            try:
                path.rename(gone)
            except FileNotFoundError:
                continue  # its writer was quicker
            # An orphan may still write into it, and NFS keeps open files under other names.
            shutil.rmtree(gone, ignore_errors=True)


def _best(paths: list[Path], verified: set[str]) -> Path | None:
    """The whole one with the smallest validation loss, the newest of several; None if no one has any."""
    losses = []
    for path in paths:
        try:
            loss = checkpoint.read_state(path).val_loss
        except (OSError, TypeError, ValueError):
            continue  # damaged, and no candidate
        if loss is not None and math.isfinite(loss):
            losses.append((loss, -checkpoint.step_of(path), path))
    for _, _, path in sorted(losses):
        if path.name in verified or not checkpoint.verify(path):
            verified.add(path.name)
            return path
    return None
