"""Attempts of a run that report to wandb, for the tests of tracking; a stand-in for its server; a home without a key.

Files on disk are read with wandb's own reader, ``wandb leet inspect``: by the program that this starts, without the
half second that loading wandb takes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.config import sources
from hpcgpt.config.operation import Tracking as TrackingOptions
from hpcgpt.config.options import Config, Run
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.run import run_folder
from hpcgpt.storage import atomic
from hpcgpt.tracking.tracker import Tracker
from tests.programs import ROOT

KEY = "k" * 40
WANDB_CORE = str(metadata.distribution("wandb").locate_file("wandb/bin/wandb-core"))
LONG_S = 180.0  # on a busy machine; a tracker that has sent everything exits at once


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key and without settings; and no variable of wandb's."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
    return home


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    server = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield server
    server.close()


class Attempt:
    """One attempt of a run that logs rows as the reporter does, with a real generation file."""

    def __init__(self, tmp_path: Path, mode: str = "auto", keep: int = 0, name: str = "run") -> None:
        self.config = Config(
            run=Run(name=name, dir=str(tmp_path)),
            tracking=TrackingOptions(wandb=mode),  # type: ignore[arg-type]
        )
        self.folder = self.config.run_folder
        self.id = run_folder.prepare(self.folder)
        atomic.write(self.folder / "config.toml", sources.to_toml(self.config).encode())
        (self.folder / "generations").mkdir(exist_ok=True)
        number = 1 + len(list((self.folder / "generations").iterdir()))
        (self.folder / "generations" / f"{number:06d}.json").touch()
        self.cut(keep)
        self.tracker = Tracker(self.config, number)

    def cut(self, keep: int) -> None:
        """Keep the rows up to step `keep` in a new file, as a resume and a rollback do."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(True)[:keep] if path.exists() else []
        atomic.write(path, "".join(lines).encode())

    def write(self, steps: range, clock_ahead_s: float = 0.0, **more: Any) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            for step in steps:
                now = time.time() + clock_ahead_s
                row = {"step": step, "time": now, "tokens": 64 * step, "train/loss": 1 / step, "none": None} | more
                file.write(json.dumps(row) + "\n")

    def kill(self) -> None:
        """Kill the tracking process and wandb's core with SIGKILL, as the failure of a node does."""
        child = self.wait_for_process()
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        self.tracker.close(1, 1.0)

    def wait_for_process(self) -> subprocess.Popen[bytes]:
        (child,) = self.tracker._children
        child.starting.join()
        assert child.process is not None
        return child.process


def fragments(folder: Path, kind: str = "offline-run") -> list[list[dict[str, Any]]]:
    """Return the records of each .wandb file of an offline run (with kind "run": an online run), the oldest first."""
    found = []
    for path in sorted((folder / "wandb").glob(f"{kind}-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        read = subprocess.check_output([WANDB_CORE, "leet", "inspect", "--json", "--run-file", path], text=True)
        found.append([json.loads(line) for line in read.splitlines()])
    return found


def sync(folder: Path, *options: str) -> str:
    """Run `hpcgpt tracking sync` with this process's variables; return what it prints."""
    for path in folder.glob("generations/*.json"):  # the lease has been released
        path.with_suffix(".done").touch()
    done = subprocess.run([sys.executable, "-m", "hpcgpt.tracking", "sync", str(folder), *options], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps_of(parts: list[list[dict[str, Any]]]) -> list[int]:
    items = [record["history"]["item"] for part in parts for record in part if record["type"] == "history"]
    return [item["step"] for item in items if "train/loss" in item]


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "--no-headers", "-o", "pid", "--ppid", str(pid)], capture_output=True, text=True,
                            check=False)  # fmt: skip
    return [int(pid_text) for pid_text in listed.stdout.split()]


def until(what: Callable[[], Any], every_s: float = 0.05) -> None:
    """Wait until `what()`; ask less often where each question starts a process."""
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline
        time.sleep(every_s)
