"""A run as the drill sees it from outside: where it stands, by its files alone."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.run import run_folder

_TAIL_BYTES = 1 << 17
COUNT_EVERY_S = 0.2


@dataclass(frozen=True)
class Watched:
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tail(self) -> list[dict[str, Any]]:
        """The newest rows of metrics.jsonl; the file may be replaced or full of nothing at any moment."""
        try:
            with open(self.folder / "metrics.jsonl", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(max(0, size - _TAIL_BYTES))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return []
        rows = []
        for line in lines if size <= _TAIL_BYTES else lines[1:]:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def position(self) -> tuple[int, int]:
        """Newest step, and the attempt (generation) that made it; zeros before there is one."""
        rows = self.tail()
        return (int(rows[-1]["step"]), int(rows[-1]["attempt"])) if rows else (0, 0)

    def step_s(self) -> float:
        """Seconds a step, the median of the last ones."""
        return statistics.median([float(row["train/step_s"]) for row in self.tail()[-30:]] or [0.0])

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in run_folder.events(self.folder) if event["event"] == "start"]

    def newest_start(self) -> int:
        """The attempt that started last. On a full disk it cannot say so, and its first row does."""
        return max([self.position()[1], *(int(start["attempt"]) for start in self.starts())])

    def newest_generation(self) -> int:
        """The attempt that took the run folder last; it may have made no step yet."""
        return max([0, *(int(path.stem) for path in (self.folder / "generations").glob("[0-9]*.json"))])

    def committed(self) -> list[Path]:
        """Checkpoints with a manifest, the oldest first."""
        return sorted(path.parent for path in self.checkpoints.glob("step_*/manifest.json"))

    def being_saved(self) -> list[Path]:
        return list(self.checkpoints.glob(".step_*.tmp"))


class CheckpointCounter:
    """Counts a run's checkpoints several times a second, as a context. `most` is how many there were at any time."""

    def __init__(self, run: Watched) -> None:
        self.most = 0
        self._run, self._stop = run, threading.Event()
        self._thread = threading.Thread(target=self._count, name="checkpoint counter", daemon=True)

    def __enter__(self) -> CheckpointCounter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _count(self) -> None:
        while True:
            with suppress(OSError):  # the network file system of a lab may be away
                self.most = max(self.most, len(self._run.committed()))
            if self._stop.wait(COUNT_EVERY_S):
                return


class Undoing:
    """What the drill has still to undo of its own faults. `all` must run whatever happens."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._pending: list[tuple[float, Callable[[], bool] | None, float, str, Callable[[], object]]] = []

    def later(
        self,
        words: str,
        action: Callable[[], object],
        after_s: float,
        when: Callable[[], bool] | None = None,
        at_most_s: float = 100.0,
    ) -> None:
        """Do it `after_s` seconds from now and once `when` holds; in any case after `at_most_s`."""
        now = time.monotonic()
        self._pending.append((now + after_s, when, now + at_most_s, words, action))

    def tick(self) -> None:
        now = time.monotonic()
        for item in list(self._pending):
            due_at, when, at_last, words, action = item
            if now >= due_at and (when is None or when() or now >= at_last):
                self._pending.remove(item)
                self._say(words)
                action()

    def all(self) -> None:
        """Undo everything, now. One that fails does not keep the others from being undone."""
        problems = []
        while self._pending:
            *_, words, action = self._pending.pop()
            try:
                self._say(words)
                action()
            except Exception as error:  # whatever it was, the next one has to be undone
                problems.append(f"{words}: {error}")
        if problems:
            raise RuntimeError("; ".join(problems))

    @property
    def empty(self) -> bool:
        return not self._pending
