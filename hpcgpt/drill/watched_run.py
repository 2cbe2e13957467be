"""The state of a run as the drill sees it: read from the run's files alone. And the cleanup of the drill's faults."""

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
class WatchedRun:
    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def tail(self) -> list[dict[str, Any]]:
        """Read the newest rows of metrics.jsonl, which may be replaced or damaged at any moment."""
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
        """Return the newest step, and the attempt that made it; zeros before the first one."""
        rows = self.tail()
        return (int(rows[-1]["step"]), int(rows[-1]["attempt"])) if rows else (0, 0)

    def step_s(self) -> float:
        """Return the median seconds of the last steps."""
        return statistics.median([float(row["train/step_s"]) for row in self.tail()[-30:]] or [0.0])

    def starts(self) -> list[dict[str, Any]]:
        return [event for event in run_folder.events(self.folder) if event["event"] == "start"]

    def newest_start(self) -> int:
        """Return the attempt that started last. On a full disk it records no start, and only its rows show it."""
        return max([self.position()[1], *(int(start["attempt"]) for start in self.starts())])

    def newest_lease(self) -> int:
        """Return the number of the newest lease; its attempt may have made no step yet."""
        return max([0, *(int(path.stem) for path in (self.folder / "generations").glob("[0-9]*.json"))])

    def committed(self) -> list[Path]:
        """List the checkpoints with a manifest, the oldest first."""
        return sorted(path.parent for path in self.checkpoints.glob("step_*/manifest.json"))

    def being_saved(self) -> list[Path]:
        return list(self.checkpoints.glob(".step_*.tmp"))


class CheckpointCounter:
    """Counts a run's checkpoints several times a second, as a context. `most` is the largest count."""

    def __init__(self, run: WatchedRun) -> None:
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
            with suppress(OSError):  # the lab's file system may be unreachable
                self.most = max(self.most, len(self._run.committed()))
            if self._stop.wait(COUNT_EVERY_S):
                return


class CleanupStack:
    """The actions that end the drill's faults. `run_all` must be called whatever happens."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self._log = log
        self._pending: list[tuple[float, Callable[[], bool] | None, float, str, Callable[[], object]]] = []

    def add(
        self,
        message: str,
        action: Callable[[], object],
        after_s: float,
        when: Callable[[], bool] | None = None,
        at_most_s: float = 100.0,
    ) -> None:
        """Run `action` after `after_s` seconds and once `when` holds; in any case after `at_most_s`."""
        now = time.monotonic()
        self._pending.append((now + after_s, when, now + at_most_s, message, action))

    def run_due(self) -> None:
        """Run the actions that are due."""
        now = time.monotonic()
        for item in list(self._pending):
            due_at, when, at_last, message, action = item
            if now >= due_at and (when is None or when() or now >= at_last):
                self._pending.remove(item)
                self._log(message)
                action()

    def run_all(self) -> None:
        """Run all actions now, the newest first. If one fails the others still run."""
        problems = []
        while self._pending:
            *_, message, action = self._pending.pop()
            try:
                self._log(message)
                action()
            except Exception as error:  # of any kind: the next action has to run
                problems.append(f"{message}: {error}")
        if problems:
            raise RuntimeError("; ".join(problems))

    @property
    def empty(self) -> bool:
        return not self._pending
