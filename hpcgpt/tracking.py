"""Weights & Biases: one run, however often the job is requeued. The only module that imports wandb.

The run's id is the one in run.json, for every attempt. Without a key or without a network the attempt
is kept offline below ``<run folder>/wandb``, where ``wandb sync`` finds it. metrics.jsonl stays the
truth; wandb gets the same names, and ``step`` as the axis, since wandb's own counter cannot go back
when a crash has cost a few steps.

wandb's core process cannot be kept from dying of the SIGTERM that Slurm sends to every process of a step
(it asks for that signal itself, whatever mask it inherits), and a SIGKILL loses what it had not written
yet. So nothing that wandb does can end a run. Where it fails in the middle of an attempt (a full disk, its core gone)
it is started anew after a while, and then gets the rows that it has missed. And each attempt first sends
again what those before may have left unsent: all rows beyond the step that stands in ::

    wandb/arrived.txt    the step of the newest row that wandb has had for NEWEST_S seconds, in 12 digits

It is overwritten in its place, which needs no room on a full disk.
"""

from __future__ import annotations

import html
import netrc
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hpcgpt.config import Config
from hpcgpt.errors import UserError
from hpcgpt.metrics import NEWEST_S
from hpcgpt.preempt import shielded

_KEY_HOST = "api.wandb.ai"
RETRY_S = 30.0
BACKLOG = 100_000  # rows; those before are in metrics.jsonl alone


class Tracker:
    """Sends rows to wandb, or to nowhere if tracking is disabled. Rank 0 only."""

    def __init__(self, config: Config, run_id: str, resolved: dict[str, Any], again: list[dict[str, Any]]) -> None:
        """`resolved` is shown as the run's configuration; the rows `again` are sent first."""
        self.mode = choose_mode(config.tracking.wandb)
        self._config, self._run_id, self._resolved = config, run_id, resolved
        self._run: Any = None
        self._missed: deque[dict[str, Any]] = deque(again, maxlen=BACKLOG)
        self._sent: deque[dict[str, Any]] = deque()  # in the last seconds: a core that dies takes these along
        self._start_at = 0.0
        self._arrived = arrived(config.run_folder) or 0
        self._catch_up()

    def write(self, row: dict[str, Any]) -> None:
        if self.mode == "disabled":
            return
        if row["step"] <= self._arrived:  # the run has gone back
            self._note(row["step"] - 1)
        self._missed.append(row)
        if self._run is not None or time.monotonic() >= self._start_at:
            self._catch_up()

    def _catch_up(self) -> None:
        """Start wandb unless it runs, and send what it has not got yet."""
        if self.mode != "disabled" and self._run is None:
            self._do(self._start)
        while self._run is not None and self._missed:
            if self._do(lambda: self._run.log(_known(self._missed[0]))):
                self._sent.append(self._missed.popleft())
        step = None
        while self._sent and self._sent[0]["time"] < self._sent[-1]["time"] - NEWEST_S:
            step = self._sent.popleft()["step"]
        if step is not None:
            self._note(step)

    def _note(self, step: int) -> None:
        """All rows up to this step have arrived."""
        self._arrived = step
        with suppress(OSError):  # then more rows than necessary are sent again
            descriptor = os.open(_note_path(self._config.run_folder), os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(descriptor, b"%012d\n" % step, 0)
            finally:
                os.close(descriptor)

    def sample(self, step: int, text: str) -> None:
        """A piece of generated text."""
        if self._run is not None:
            import wandb

            page = f"<pre>{html.escape(text)}</pre>"
            self._do(lambda: self._run.log({"step": step, "sample": wandb.Html(page)}))

    def close(self, exit_code: int) -> None:
        if self._missed and exit_code == 0:  # else the next attempt sends them, and this one has to leave
            self._catch_up()
        if self._run is not None:
            import wandb

            self._do(lambda: self._run.finish(exit_code=exit_code))
            self._run = None
            with suppress(Exception):  # its core process should be gone before ours is
                wandb.teardown()
        self.mode = "disabled"

    def _start(self) -> None:
        config = self._config
        # The mask is inherited by the threads and processes that wandb starts.
        with shielded():
            import wandb

            (config.run_folder / "wandb").mkdir(exist_ok=True)
            self._note(self._arrived)  # while there is room for it
            self._run = wandb.init(
                project=config.tracking.project,
                id=self._run_id,
                name=config.run.name,
                dir=config.run_folder,
                mode="online" if self.mode == "online" else "offline",
                resume="allow" if self.mode == "online" else None,
                config=self._resolved,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    # Rows are otherwise kept in memory for 15 s.
                    x_transaction_log_flush_interval=1.0,
                    # By default it waits for a dead network without end, while Slurm's time runs out.
                    finish_timeout=20.0,
                ),
            )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _do(self, action: Callable[[], object]) -> bool:
        """Ask wandb for something; False if it failed, and then it is left alone for a while."""
        try:
            action()
        except Exception as error:  # whatever wandb raises, it must not end the run
            print(
                f"warning: wandb failed and is tried again in {RETRY_S:.0f} s, metrics.jsonl has everything: "
                f"{type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
            self._run, self._start_at = None, time.monotonic() + RETRY_S
            self._missed.extendleft(reversed(self._sent))
            self._sent.clear()
            with suppress(Exception):  # it would complain once more at exit
                import wandb

                wandb.teardown()
            return False
        return True


def _known(row: dict[str, Any]) -> dict[str, Any]:
    """Without the figures that are no finite numbers."""
    return {key: value for key, value in row.items() if value is not None}


def arrived(run_folder: Path) -> int | None:
    """The step up to which wandb surely has all rows of a run; None if that is not known."""
    try:
        return int(_note_path(run_folder).read_text())
    except FileNotFoundError:  # an older version did not keep it
        return None if (run_folder / "wandb").exists() else 0
    except (OSError, ValueError):
        return None


def _note_path(run_folder: Path) -> Path:
    return run_folder / "wandb" / "arrived.txt"


def check(wanted: str) -> None:
    """Raises UserError if "online" is asked for and there is no key."""
    if wanted == "online" and not _has_key():
        raise UserError("tracking.wandb is online, but there is no key: run `wandb login`, or use offline")


def choose_mode(wanted: str) -> str:
    """'online', 'offline' or 'disabled'. WANDB_MODE wins over "auto", as wandb's users expect."""
    if wanted == "auto" and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    if wanted == "auto":
        return "online" if _has_key() and _reachable() else "offline"
    return wanted


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(_server()[0])
    except (OSError, netrc.NetrcParseError):
        return False
    return found is not None


def _reachable() -> bool:
    try:
        with socket.create_connection(_server(), timeout=5):
            return True
    except OSError:
        return False


def _server() -> tuple[str, int]:
    address = urlsplit(os.environ.get("WANDB_BASE_URL", f"https://{_KEY_HOST}"))
    return address.hostname or _KEY_HOST, address.port or (443 if address.scheme == "https" else 80)
