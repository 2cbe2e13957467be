"""Which checkpoints go: old ones once newer ones have been read back, and what ended attempts left half done.

What stays are the `keep_last` newest valid ones, every `keep_every`-th step, and the one with the smallest
validation loss. After a save (`prune_after_save`) only checkpoints whose checksums hold count, so an old one is never
removed because of a damaged newer one.

To read a large checkpoint back takes longer than some attempts last. So that their checkpoints do not pile up, each
start removes what is too much, once it has loaded one (`prune`). That reads no tensors: those whose manifest, sizes
and state fit count as well, as long as one that has been read back, the loaded one, is among those that stay. The same
makes room before a save that would have none: what would be removed after that save is removed before it. So there
are never more than the settings keep, the one that is being written, and the one that has just been saved.

One that cannot be read (EIO: perhaps this host's fault) neither counts nor goes, and keeps no other from going.

An orphan of an earlier generation may be stopped between its last look for a newer one and a rename, and wake up
when a newer one relies on what it then moves. That cannot be kept from happening, so it is made to do no harm. To
move and to destroy are two things, and a look stands between them::

    removing        step_X -> .step_X.gN.removed    look    its manifest is unlinked    the rest is
    setting aside   step_X -> damaged_step_X.gN     look    REASON.txt is written

So what was moved by generation N while a newer one was there has still its manifest, or has no reason, and stays so.
The newer one puts it back: before each of its own removals, and each start before it chooses (`clean`). If it was moved
rightly it is merely found superfluous, or damaged, once more. And what one generation is about to put back, or
to destroy, is by then renamed by a newer one, and gone for the older one's system calls, which name it by its path.

No torch in here.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

from hpcgpt.checkpoint import layout
from hpcgpt.config import options
from hpcgpt.output import streams
from hpcgpt.storage.lease import Lease

_HIDDEN = re.compile(r"(\.(step_\d+)\.g(\d+)\.(tmp|removed))(\.gone)?")
_ASIDE = re.compile(r"damaged_(step_\d+)\.g(\d+)(\.\d+)?")


def prune_after_save(checkpoints: Path, keep: options.Checkpoint, lease: Lease, verified: set[str]) -> list[Path]:
    """Remove what is not to stay; returns those that went.

    `verified` has the names that this process has read back; it is added to. Damaged ones are set aside.

    Raises:
        OSError: one could not be removed.
        UserError: there is one of another format version.
    """
    recover_leftovers(checkpoints, lease)
    whole: list[Path] = []
    unreadable: set[Path] = set()
    waiting = layout.found(checkpoints)
    while waiting and len(whole) < keep.keep_last:
        path = waiting.pop(0)
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
    best = _best([*whole, *waiting], verified, unreadable, read_back=True) if keep.keep_best else None
    return _remove_all(waiting, keep, lease, {best, *unreadable})


def prune(
    checkpoints: Path, keep: options.Checkpoint, lease: Lease, verified: set[str], more: int = 0, regular: int = 0
) -> list[Path]:
    """Remove what is too much, without reading tensors; returns those that went. Nothing goes unless one of `verified`
    stays.

    `more` are about to be saved: as many fewer of the newest stay, but one at least. The newest of a multiple of
    `regular` steps stays, too: a loss spike sends the run back to that one, however often it was interrupted since.

    Raises:
        OSError: one could not be removed.
    """
    staying: list[Path] = []
    unreadable: set[Path] = set()
    waiting = []
    for path in layout.found(checkpoints):
        safe = any(one.name in verified for one in staying)
        if len(staying) >= max(1, keep.keep_last - more) and safe:
            waiting.append(path)
            continue
        try:
            fits = not layout.check_structure(path)
        except OSError as error:
            _warn_unreadable(path, error)
            unreadable.add(path)
            continue
        except layout.FormatError:
            fits = False
        # Beyond the newest only one that was read back is still looked for. What is damaged is the next start's matter.
        if fits and (len(staying) < max(1, keep.keep_last - more) or path.name in verified):
            staying.append(path)
        elif fits:
            waiting.append(path)
    if not any(one.name in verified for one in staying):
        return []
    best = _best([*staying, *waiting], verified, unreadable, read_back=False) if keep.keep_best else None
    multiples = [path for path in [*staying, *waiting] if regular and layout.step_of(path) % regular == 0]
    back = max(multiples, key=layout.step_of, default=None)
    return _remove_all(waiting, keep, lease, {best, back, *unreadable})


def _remove_all(paths: list[Path], keep: options.Checkpoint, lease: Lease, staying: set[Path | None]) -> list[Path]:
    going = [
        path
        for path in paths
        if path not in staying and not (keep.keep_every and layout.step_of(path) % keep.keep_every == 0)
    ]
    for path in going:
        remove(path, lease)
    return going


def _warn_unreadable(path: Path, error: OSError) -> None:
    streams.warn(f"checkpoint {path} cannot be read, and stays: {error}")


def remove(path: Path, lease: Lease) -> None:
    """Raises OSError if that could not be done."""
    lease.check()
    # Out of sight first: a removal that is cut short must not leave a checkpoint without its files.
    hidden = path.with_name(f".{path.name}.g{lease.number:04d}.removed")
    path.rename(hidden)
    lease.check()
    _destroy(hidden)


def recover_leftovers(checkpoints: Path, lease: Lease) -> None:
    """Take away what earlier generations left half written or half removed; put back what they took away wrongly.

    Each is renamed first. An orphan of an earlier generation that is about to give its checkpoint its name finds it
    gone, or was quicker, and then its checkpoint is there before ours is chosen. What it begins later fails its
    own look for a newer generation. So none of its checkpoints ever follows one of ours.
    """
    for path in sorted(layout.entries(checkpoints), reverse=True):  # a .gone before what would become it
        hidden, aside = _HIDDEN.fullmatch(path.name), _ASIDE.fullmatch(path.name)
        if hidden and int(hidden[3]) < lease.number:
            gone = path.with_name(f"{hidden[1]}.gone")
            try:
                path.rename(gone)
            except FileNotFoundError:
                continue  # its writer was quicker
            final = path.with_name(hidden[2])
            if hidden[4] == "removed" and (gone / "manifest.json").exists() and not final.exists():
                gone.rename(final)
            else:
                # An orphan may still write into it, and NFS keeps open files under other names.
                with suppress(OSError):
                    _destroy(gone)
        elif aside and int(aside[2]) < lease.number and path.is_dir() and not path.is_symlink():
            final = path.with_name(aside[1])
            if not (path / "REASON.txt").exists() and not final.exists():
                path.rename(final)


def _destroy(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()  # what it points to is not ours
        return
    # First what makes it a checkpoint: one that lost other files must not be put back.
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _best(paths: list[Path], verified: set[str], unreadable: set[Path], read_back: bool) -> Path | None:
    """Return the best checkpoint; see layout.best. Warn about unreadable ones and add them to `unreadable`.

    With `read_back` it is one whose checksums have been compared, now if not before.
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
        if path.name in verified or not read_back:
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
