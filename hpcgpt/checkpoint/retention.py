"""Decides which checkpoints are removed, and removes them: old ones, and what ended attempts left incomplete.

The `keep_last` newest valid ones are kept, every `keep_every`-th step, and the one with the smallest validation loss.
After a save (`prune_after_save`), only checkpoints whose checksums have been compared count, so that no old one is
removed because of a damaged newer one. The ranks compare them together, each a part (`unread`); what they could not
read, or found damaged, is read here once more.

Comparing the checksums of a large checkpoint takes longer than some attempts last. So that their checkpoints do not
accumulate, each start removes old ones, too, once it has loaded one (`prune`). This reads no tensors: checkpoints whose
manifest, sizes and state fit count as well, provided that one whose checksums have been compared, the loaded one, is
kept. The same makes room before a save that would have too little: what would be removed after the save is removed
before it. So there are never more than the settings keep, the one that is being written, and the one just saved.

A checkpoint that cannot be read (EIO: perhaps this host's fault) does not count, is kept, and does not prevent others
from being removed.

A process of an earlier generation may be suspended between its last check of the lease and a rename, and continue when
a newer generation uses what it then renames. This cannot be prevented, so it must do no harm: renaming and destroying
are separate steps, with a check of the lease between them::

    removing        step_X -> .step_X.gN.removed    check    unlink its manifest    remove the rest
    setting aside   step_X -> damaged_step_X.gN     check    write REASON.txt

So what generation N has renamed although there was a newer one keeps its manifest, or has no REASON.txt. The newer
generation gives it back its name: before each of its own removals, and at each start before it chooses a checkpoint
(`recover_leftovers`). If it was renamed rightly, it is merely found to be old, or damaged, once more. And whatever a
generation is about to restore or destroy has another path once a newer one has renamed it, so that the system calls of
the older one do not reach it.

No torch in here.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.parts import Part, parts_of
from hpcgpt.config import options
from hpcgpt.output import streams
from hpcgpt.storage.lease import Lease

Unread = tuple[str, list[Part]]  # the name of a checkpoint, and all parts of its files
_HIDDEN = re.compile(r"(\.(step_\d+)\.g(\d+)\.(tmp|removed))(\.gone)?")
_ASIDE = re.compile(r"damaged_(step_\d+)\.g(\d+)(\.\d+)?")


def unread(checkpoints: Path, keep: options.Checkpoint, verified: set[str]) -> list[Unread]:
    """Return the checkpoints that `prune_after_save` would read back, unless the ranks do so before, with their parts.

    Damaged and unreadable ones are left to `prune_after_save`.
    """
    found: list[Path] = []
    with suppress(OSError):
        found = layout.found(checkpoints)
    wanted = found[: keep.keep_last]
    if keep.keep_best and (best := layout.best(found, _loss_if_readable, lambda _: True)):
        wanted.append(best)
    parts = {}
    for path in wanted:
        with suppress(OSError, ValueError):  # FormatError is a ValueError
            if path.name not in verified and not layout.check_structure(path):
                parts[path.name] = parts_of(layout.read_files(path))
    return list(parts.items())


def _loss_if_readable(path: Path) -> float | None:
    with suppress(OSError, TypeError, ValueError, RecursionError):
        return layout.val_loss(path)
    return None


def prune_after_save(checkpoints: Path, keep: options.Checkpoint, lease: Lease, verified: set[str]) -> list[Path]:
    """Remove old checkpoints after a save; return those that were removed. Damaged ones are set aside.

    `verified`: names of checkpoints whose checksums this process has compared; new ones are added.

    Raises:
        OSError: one could not be removed.
        UserError: one has another format version.
    """
    recover_leftovers(checkpoints, lease)
    whole: list[Path] = []
    unreadable: set[Path] = set()
    older = layout.found(checkpoints)
    while older and len(whole) < keep.keep_last:
        path = older.pop(0)
        try:
            problem = "" if path.name in verified else layout.verify(path)
        except OSError as error:
            _warn_unreadable(path, error)
            unreadable.add(path)
            continue
        if problem:
            lease.check()
            layout.quarantine(path, problem, lease)
        else:
            verified.add(path.name)
            whole.append(path)
    best = _best([*whole, *older], verified, unreadable, compare=True) if keep.keep_best else None
    return _remove_all(older, keep, lease, {best, *unreadable})


def prune(
    checkpoints: Path, keep: options.Checkpoint, lease: Lease, verified: set[str], more: int = 0, regular: int = 0
) -> list[Path]:
    """Remove old checkpoints without reading tensors; return those that were removed: none unless one of `verified` is
    kept.

    `more` are about to be saved: so many fewer of the newest are kept, but at least one. The newest at a multiple of
    `regular` steps is kept, too: a loss spike sends the run back to it, however often it was interrupted since.

    Raises:
        OSError: one could not be removed.
    """
    kept: list[Path] = []
    unreadable: set[Path] = set()
    older = []
    for path in layout.found(checkpoints):
        safe = any(one.name in verified for one in kept)
        if len(kept) >= max(1, keep.keep_last - more) and safe:
            older.append(path)
            continue
        try:
            fits = not layout.check_structure(path)
        except OSError as error:
            _warn_unreadable(path, error)
            unreadable.add(path)
            continue
        except layout.FormatError:
            fits = False
        # Beyond the newest, only a verified one is still needed. The next start sets damaged ones aside.
        if fits and (len(kept) < max(1, keep.keep_last - more) or path.name in verified):
            kept.append(path)
        elif fits:
            older.append(path)
    if not any(one.name in verified for one in kept):
        return []
    best = _best([*kept, *older], verified, unreadable, compare=False) if keep.keep_best else None
    multiples = [path for path in [*kept, *older] if regular and layout.step_of(path) % regular == 0]
    rollback_target = max(multiples, key=layout.step_of, default=None)
    return _remove_all(older, keep, lease, {best, rollback_target, *unreadable})


def _remove_all(paths: list[Path], keep: options.Checkpoint, lease: Lease, kept: set[Path | None]) -> list[Path]:
    """Remove `paths` except `kept` and every `keep_every`-th step; return those that were removed."""
    removed = [
        path
        for path in paths
        if path not in kept and not (keep.keep_every and layout.step_of(path) % keep.keep_every == 0)
    ]
    for path in removed:
        remove(path, lease)
    return removed


def _warn_unreadable(path: Path, error: OSError) -> None:
    streams.warn(f"checkpoint {path} cannot be read, and is kept: {error}")


def remove(path: Path, lease: Lease) -> None:
    """Remove a checkpoint. Raises OSError if that failed."""
    lease.check()
    # Hide it first: a removal that is interrupted must not leave a checkpoint without its files.
    hidden = path.with_name(f".{path.name}.g{lease.number:04d}.removed")
    path.rename(hidden)
    lease.check()
    _destroy(hidden)


def recover_leftovers(checkpoints: Path, lease: Lease) -> None:
    """Remove what earlier generations left half written or half removed; restore what they renamed wrongly.

    Each is renamed first. A process of an earlier generation that is about to make its checkpoint visible does not find
    it any more, or was faster, and then the checkpoint is there before this generation chooses one. What it begins
    later fails at its check of the lease. So no checkpoint of an earlier generation appears after one of this one.
    """
    for path in sorted(layout.entries(checkpoints), reverse=True):  # X.gone before X, which may be renamed to it
        hidden, aside = _HIDDEN.fullmatch(path.name), _ASIDE.fullmatch(path.name)
        if hidden and int(hidden[3]) < lease.number:
            gone = path.with_name(f"{hidden[1]}.gone")
            try:
                path.rename(gone)
            except FileNotFoundError:
                continue  # its writer was faster
            final = path.with_name(hidden[2])
            if hidden[4] == "removed" and (gone / "manifest.json").exists() and not final.exists():
                gone.rename(final)
            else:
                # An earlier generation may still write into it, and NFS keeps open files under other names.
                with suppress(OSError):
                    _destroy(gone)
        elif aside and int(aside[2]) < lease.number and path.is_dir() and not path.is_symlink():
            final = path.with_name(aside[1])
            if not (path / "REASON.txt").exists() and not final.exists():
                path.rename(final)


def _destroy(folder: Path) -> None:
    """Delete a folder that is hidden already."""
    if folder.is_symlink():
        folder.unlink()  # what it points to is not ours
        return
    # The manifest first: a checkpoint that has lost other files must not be restored.
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _best(paths: list[Path], verified: set[str], unreadable: set[Path], compare: bool) -> Path | None:
    """Return the best checkpoint; see layout.best. Warn about unreadable ones and add them to `unreadable`.

    `compare`: unless it is `verified`, compare its checksums, and add it.
    """

    def loss_of(path: Path) -> float | None:
        try:
            return layout.val_loss(path)
        except OSError as error:
            if error.errno not in layout.MISSING:
                _warn_unreadable(path, error)
                unreadable.add(path)
        except (TypeError, ValueError):
            pass  # damaged
        return None

    def is_whole(path: Path) -> bool:
        if path.name in verified or not compare:
            return True
        try:
            whole = not layout.verify(path)
        except OSError as error:
            _warn_unreadable(path, error)
            unreadable.add(path)
            return False
        if whole:
            verified.add(path.name)
        return whole

    return layout.best(paths, loss_of, is_whole)
