"""A part of the campaign while it runs: its time, its file of findings, and the programs that it starts.

Each finding is one line of JSON, on disk before the next check begins::

    {"part": "works", "check": "compiled", "ok": true, "at_s": 41.2, "took_s": 30.1, "first_loss": 10.82, ...}

`ok`: false is a fault, null says that there was not enough time left for the check. `at_s` counts from the start of
the part.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TAIL = 1500  # characters of a program's output that a finding keeps
ENOUGH_S = 5.0  # no check begins with less time than this

Figures = dict[str, Any]


class FaultError(Exception):
    """A check has found a fault; the text is what the program said."""


class TimeOverError(Exception):
    """The part's time was over before the check was; the text is what the program said."""


@dataclass
class Part:
    """`minutes`: after these no check begins, and what still runs is ended. `small`: tiny sizes."""

    name: str
    out: Path
    scratch: Path
    device: str
    small: bool
    minutes: float
    peer: Path | None
    started_at: float = field(default_factory=time.monotonic)
    faults: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)  # of what checks at the same time share
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def left_s(self) -> float:
        return self.started_at + 60 * self.minutes - time.monotonic()

    @property
    def data(self) -> Path:
        return self.scratch / ("shards_small" if self.small else "shards")

    def note(self, check: str, ok: bool | None, figures: Figures) -> None:
        """Write a finding to the part's file and to the disk, and print it."""
        at_s = round(time.monotonic() - self.started_at, 1)
        line = json.dumps({"part": self.name, "check": check, "ok": ok, "at_s": at_s} | figures)
        with self._lock:
            self.faults += ok is False
            with (self.out / f"{self.name}.jsonl").open("a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
            print({True: "ok     ", False: "FAULT  ", None: "no time"}[ok], line[:600], flush=True)

    def check(self, name: str, work: Callable[[], Figures]) -> None:
        """Run a check and write what it has found. A fault in it is a finding, too."""
        if self.left_s < ENOUGH_S:
            self.note(name, None, {})
            return
        began_at = time.monotonic()
        ok: bool | None = True
        try:
            figures = work()
        except TimeOverError as error:
            ok, figures = None, {"said": str(error)}
        except Exception as error:  # whatever it is, the other checks have to run
            ok, figures = False, {"error": f"{type(error).__name__}: {error}"[-TAIL:]}
        self.note(name, ok, {"took_s": round(time.monotonic() - began_at, 1)} | figures)

    def checks(self, all_of_them: Iterable[tuple[str, Callable[[], Figures]]], at_once: int) -> None:
        """Run these checks, some at the same time, begun in the given order."""
        with ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(self.check, name, work) for name, work in all_of_them]:
                done.result()

    def run(self, words: Sequence[str], env: dict[str, str] | None = None) -> str:
        """Run ``python WORDS`` in the repository to its end; return what it printed.

        Raises:
            FaultError: its exit status is not 0.
            TimeOverError: the part's time was over.
        """
        with self.started(words, env) as running:
            try:
                printed, _ = running.communicate(timeout=max(1.0, self.left_s))
            except subprocess.TimeoutExpired:
                end(running)
                printed, _ = running.communicate()
                raise TimeOverError(printed[-TAIL:]) from None
        if running.returncode:
            raise FaultError(f"status {running.returncode}: {' '.join(words)}\n{printed[-TAIL:]}")
        return printed

    def started(self, words: Sequence[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start ``python WORDS`` in the repository, in a session of its own."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths} | (env or {}), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def end(running: subprocess.Popen[str]) -> None:
    """End a program of `Part.started` with all that it has started."""
    os.killpg(running.pid, signal.SIGKILL)


def last_json(printed: str) -> Figures:
    """Return the last line that is an object; libraries may have said something after it."""
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise FaultError(f"no figures in: {printed[-TAIL:]}")
    return json.loads(lines[-1])  # type: ignore[no-any-return]


def flags(values: dict[str, Any]) -> list[str]:
    """Format ``{"train.steps": 3}`` as ``--train.steps 3``."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def rows(run: Path) -> list[Figures]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
