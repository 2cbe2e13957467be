"""Weights & Biases: one run however often the job is requeued, and isolated from training.

Training never calls wandb. A separate process on rank 0's host (``hpcgpt.tracking.wandb_process``) follows
metrics.jsonl and sends the missing rows. This module starts that process, adds samples to samples.jsonl in the run
folder, and at the end gives the process a limited time to finish. What it could not send is sent by the process of the
next attempt, or by ::

    python -m hpcgpt.tracking sync RUN_FOLDER

which sends everything that the server does not have, and may be repeated.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from hpcgpt.config.options import Config
from hpcgpt.distributed.stop_signals import shielded
from hpcgpt.errors import UserError
from hpcgpt.output import streams

ASK_S = 30.0  # importing wandb from a cold network file system takes many seconds
STATE = "HPCGPT_TRACKING_STATE"  # the state that the process keeps when it restarts itself: wandb_process.State


class Tracker:
    """Starts the process that sends rows and samples to wandb, unless tracking is disabled. Rank 0 only.

    Only `close` waits, for `patience_s` seconds at most.
    """

    def __init__(self, config: Config, generation: int = 0) -> None:
        """Start the process. `generation` is this attempt's number; the process exits when there is a newer attempt."""
        self._folder = config.run_folder
        self._child: subprocess.Popen[bytes] | None = None
        self._starting: threading.Thread | None = None
        if _disabled(config.tracking.wandb):
            return
        command = [sys.executable, "-m", "hpcgpt.tracking.wandb_process", str(self._folder), config.tracking.wandb,
                   str(generation)]  # fmt: skip
        # In a thread: the program may be on a slow file system.
        self._starting = threading.Thread(target=self._start, args=(command,), daemon=True)
        self._starting.start()

    def _start(self, command: list[str]) -> None:
        try:
            # In a session of its own, so that Ctrl-C does not reach it and its whole group can be killed. It inherits
            # the signal mask, but wandb's core process unblocks SIGTERM, and is restarted if that ends it.
            with shielded():
                self._child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            streams.warn(f"nothing of this attempt is sent to wandb: {error}")

    def sample(self, step: int, text: str) -> None:
        """Append a generated text to samples.jsonl; this writes to the disk.

        Raises:
            OSError: there is no room for it.
        """
        if self._starting is None:
            return
        line = json.dumps({"step": step, "time": time.time(), "text": text}) + "\n"
        descriptor = os.open(self._folder / "samples.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def close(self, exit_code: int, patience_s: float) -> None:
        """Let the process send the rest, for `patience_s` seconds at most, and end it."""
        if self._starting is None:
            return
        deadline = time.monotonic() + patience_s
        self._starting.join(patience_s)
        self._starting = None
        if (child := self._child) is None:
            return
        assert child.stdin is not None
        with suppress(OSError):  # it has ended already
            child.stdin.write(f"finish {exit_code} {max(0.0, deadline - time.monotonic())}\n".encode())
            child.stdin.close()
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            streams.warn(
                f"wandb did not take everything within {patience_s:.0f} s; the next attempt sends the rest, "
                f"or `{sync_command(self._folder)}`",
            )
        with suppress(OSError):  # wandb's core process is in the same group
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it may be waiting for a disk
            child.wait(1)


def check(wanted: str) -> None:
    """Raise UserError if tracking.wandb is "online" and wandb has no key, as a process of its own finds out.

    Without an answer within ASK_S seconds the run starts, and the process that sends rows will print what is wrong.
    """
    if wanted != "online" or os.environ.get("WANDB_API_KEY"):
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hpcgpt.tracking.wandb_process", "--has-key"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_S, check=False,
        )  # fmt: skip
        has_key = done.stdout.strip().rpartition("\n")[2]
    except (OSError, subprocess.TimeoutExpired) as error:
        streams.warn(f"could not find out whether wandb has a key: {error}")
        return
    if has_key == "False":
        raise UserError("tracking.wandb is online, but there is no key: run `wandb login`, or use offline")


def _disabled(wanted: str) -> bool:
    # wandb itself reads the rest of its settings; this one is read here to save a process.
    return wanted == "disabled" or (wanted == "auto" and os.environ.get("WANDB_MODE") == "disabled")


def sync_command(folder: Path) -> str:
    return f"python -m hpcgpt.tracking sync {folder}"
