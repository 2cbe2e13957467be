"""Compares the shards' checksums with the manifest while training runs: `data.verify_mb_per_s`.

A shard of the right size whose bytes have changed trains without an error if its ids are within the vocabulary. Reading
terabytes before the first step would take hours, so rank 0 reads them in a thread of the lowest priority, at a bounded
rate. A damaged shard is reported by a warning and the event ``damaged_shard``; training continues, and a person has to
decide. The event ``shards_verified`` follows when all shards have been read.

If an attempt ends before that, the next one reads the remaining shards. The run folder's ``verified.json`` lists the
intact ones, each with its file's identity, so that a file that was rewritten or moved since is read again::

    {DIGEST OF THE DATA SET: {SHARD: [PATH, BYTES, MTIME IN NS, INODE]}}

Entries of earlier versions, which have names only, are ignored.

No torch in here.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from hpcgpt.data.datasets import DataSet
from hpcgpt.data.shard_format import Shard
from hpcgpt.data.shard_reader import Split
from hpcgpt.output import streams
from hpcgpt.storage import atomic

_Notes = dict[str, dict[str, list[Any]]]  # as in verified.json

_READ_BYTES = 1 << 20
_NOTE_EVERY_S = 60.0
_CLOSE_S = 2.0  # a disk that does not answer must not delay the end of the process


class ShardCheck:
    """The check of one attempt, on rank 0. Its thread runs until all shards have been read, or `close` is called."""

    def __init__(self, sets: Sequence[DataSet], folder: Path, mb_per_s: float, record: Callable[..., object]) -> None:
        """`folder` is the run's; `record` writes an event, from the check's own thread."""
        self._sets, self._path, self._record = sets, folder / "verified.json", record
        self._bytes_per_s = mb_per_s * 1e6
        self._off = threading.Event()
        self._read = 0
        self._thread = threading.Thread(target=self._run, name="shard check", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the check, and save which shards have been verified."""
        self._off.set()
        self._thread.join(_CLOSE_S)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the check; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with suppress(OSError):  # some systems do not allow a thread its own priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._started_at = noted_at = time.monotonic()
        whole, damaged, changed = _read_notes(self._path), 0, False
        try:
            for part, split, shard in self._shards():
                known = whole.setdefault(part.manifest.digest, {})
                path = split.folder / f"{shard.name}.bin"
                before = _identity(path)
                if before and known.get(shard.name) == before:
                    continue
                changed |= known.pop(shard.name, None) is not None
                problem = self._problem(path, split, shard)
                if problem is None:
                    return
                if problem:
                    damaged += 1
                    self._warn(path, problem)
                elif before and before == _identity(path):  # else it was changed while it was read
                    known[shard.name] = before
                    changed = True
                if time.monotonic() > noted_at + _NOTE_EVERY_S:
                    self._note(whole)
                    noted_at, changed = time.monotonic(), False
            if self._read:
                self._record("shards_verified", bytes=self._read, damaged=damaged,
                             seconds=time.monotonic() - self._started_at)  # fmt: skip
        finally:
            if changed:
                self._note(whole)

    def _shards(self) -> Iterator[tuple[DataSet, Split, Shard]]:
        for part in self._sets:
            for split in (part.train, part.val):
                for shard in split.shards if split else ():
                    yield part, split, shard  # type: ignore[misc]

    def _problem(self, path: Path, split: Split, shard: Shard) -> str | None:
        """Return what is wrong with a shard; '' if nothing; None if the check was closed meanwhile."""
        digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_READ_BYTES))
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
                    if not split.fits_in_memory:  # if it fits, it should stay in the page cache for training
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    self._read += count
                    if self._off.wait(pause_s(self._read, time.monotonic() - self._started_at, self._bytes_per_s)):
                        return None
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return "" if digest.hexdigest() == shard.xxh3 else "is damaged: its checksum is not the one in the manifest"

    def _warn(self, path: Path, problem: str) -> None:
        streams.warn(
            f"{path} {problem}, and this run trains on it: see `python -m data_prep.verify {path.parent}`, "
            "and make the shards again for another run"
        )
        self._record("damaged_shard", path=str(path), problem=problem)

    def _note(self, whole: _Notes) -> None:
        with suppress(OSError):  # the next attempt reads them again
            atomic.write(self._path, (json.dumps(whole) + "\n").encode())


def pause_s(read: int, elapsed_s: float, bytes_per_s: float) -> float:
    """Return how long to wait after `read` bytes in `elapsed_s`, to read no faster than `bytes_per_s`."""
    return max(0.0, read / bytes_per_s - elapsed_s)


def _identity(path: Path) -> list[Any]:
    """Return the identity of a file, which changes when it is rewritten; [] if it cannot be examined."""
    try:
        path = path.resolve()
        file = path.stat()
    except (OSError, RuntimeError):  # circular links, in Python 3.12 and earlier
        return []
    return [str(path), file.st_size, file.st_mtime_ns, file.st_ino]


def _read_notes(path: Path) -> _Notes:
    """Read what earlier attempts have verified; empty if the file is damaged."""
    try:
        notes: dict[str, Any] = json.loads(path.read_bytes())
        return {str(digest): dict(shards) for digest, shards in notes.items() if isinstance(shards, dict)}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
