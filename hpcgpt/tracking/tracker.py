"""Weights & Biases and TensorBoard: one run however often the job is requeued, and isolated from training.

Training never calls them. Separate processes on rank 0's host (``hpcgpt.tracking.wandb_process`` and
``tensorboard_process``) follow the run folder and send what is missing. This module starts them, adds samples and times
of the ranks to files in the run folder, and at the end gives the processes a limited time to finish. What wandb's could
not send is sent by the process of the next attempt, or by ::

    hpcgpt tracking sync RUN_FOLDER

which sends everything that the server does not have, and may be repeated.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcgpt.config.options import Config
from hpcgpt.distributed.stop_signals import shielded
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.run import run_folder

NICE = 10  # of the processes that follow the run: where cores are scarce, the ranks and their loaders come first
ASK_S = 30.0  # importing wandb from a cold network file system takes many seconds
STATE = "HPCGPT_TRACKING_STATE"  # the state that the process keeps when it restarts itself: wandb_process.State


class Child:
    """A process that follows the run folder beside training, started in a thread: it may be on a slow file system."""

    def __init__(self, name: str, module: str, *arguments: str) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        command = [sys.executable, "-m", f"hpcgpt.tracking.{module}", *arguments]
        self.starting = threading.Thread(target=self._start, args=(command,), daemon=True)
        self.starting.start()

    def _start(self, command: list[str]) -> None:
        try:
            # In a session of its own, so that Ctrl-C does not reach it and its whole group can be killed. It inherits
            # the signal mask, but wandb's core process unblocks SIGTERM, and is restarted if that ends it.
            with shielded():
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
                _lower_priority(self.process.pid)  # at once, since threads and children inherit it
        except OSError as error:
            streams.warn(f"nothing of this attempt is sent to {self.name}: {error}")

    def finish(self, exit_code: int, deadline: float) -> None:
        """Ask it to finish until `deadline`, by time.monotonic, and close its standard input."""
        self.starting.join(max(0.0, deadline - time.monotonic()))
        if self.process is None:
            return
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended already
            self.process.stdin.write(f"finish {exit_code} {max(0.0, deadline - time.monotonic())}\n".encode())
            self.process.stdin.close()

    def end(self, deadline: float) -> str:
        """Wait for its end until `deadline`, and kill what is left of it.

        Return "" if it has sent everything, else why not, in words that follow those.
        """
        if self.process is None:
            return ""
        began = time.monotonic()
        try:
            status = self.process.wait(max(0.0, deadline - began))
            ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            problem = f": its process {ended}" if status else ""
        except subprocess.TimeoutExpired:
            problem = f" within {deadline - began:.0f} s"
        with suppress(OSError):  # wandb's core process is in the same group
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # it may be waiting for a disk
            self.process.wait(1)
        return problem


def _lower_priority(pid: int) -> None:
    """Set the priority of a process, which may have ended. Where Linux gives each session an equal share of a core,
    whatever the priorities in it (sched_autogroup), that of its session, too.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, max(os.getpriority(os.PRIO_PROCESS, 0), NICE))
        Path(f"/proc/{pid}/autogroup").write_text(str(NICE))


class Tracker:
    """Starts the processes that send rows and samples to wandb and TensorBoard, unless they are disabled. Rank 0 only.

    Only `close` waits, for `patience_s` seconds at most.
    """

    def __init__(self, config: Config, generation: int = 0) -> None:
        """Start them. `generation` is this attempt's number; a process exits when there is a newer attempt."""
        self._folder = config.run_folder
        self._children: list[Child] = []
        folder, mode = str(self._folder), config.tracking.wandb
        if not _disabled(mode):
            self._children.append(Child("wandb", "wandb_process", folder, mode, str(generation)))
        if config.tracking.tensorboard:
            self._children.append(Child("TensorBoard", "tensorboard_process", folder, str(generation)))

    def sample(self, step: int, text: str) -> None:
        """Append a generated text to samples.jsonl, also where nothing is sent: reports show it.

        This writes to the disk.

        Raises:
            OSError: there is no room for it.
        """
        run_folder.append_line(self._folder / "samples.jsonl", {"step": step, "time": time.time(), "text": text})

    def ranks(self, step: int, line: Mapping[str, Any]) -> None:
        """Append the times of the ranks to ranks.jsonl, which only trackers read; as `sample`."""
        if self._children:
            run_folder.append_line(self._folder / "ranks.jsonl", {"step": step, "time": time.time(), **line})

    def close(self, exit_code: int, patience_s: float) -> None:
        """Let the processes send the rest, for `patience_s` seconds at most, and end them."""
        deadline = time.monotonic() + patience_s
        children, self._children = self._children, []
        for child in children:
            child.finish(exit_code, deadline)
        for child in children:
            if problem := child.end(deadline):
                streams.warn(
                    f"{child.name} did not take everything{problem}; the next attempt sends the rest"
                    + (f", or `{sync_command(self._folder)}`" if child.name == "wandb" else "")
                )


def check(wanted: str) -> None:
    """Raise UserError if tracking.wandb is "online" and wandb has no key, as a process of its own finds out.

    Without an answer within ASK_S seconds the run starts, and the process that sends rows will print what is wrong.
    """
    if wanted != "online" or os.environ.get("WANDB_API_KEY"):
        return
    try:
        _, has_key = server_and_key()
    except (OSError, subprocess.SubprocessError) as error:
        streams.warn(f"could not find out whether wandb has a key: {error}")
        return
    if not has_key:
        raise UserError("tracking.wandb is online, but there is no key: run `wandb login`, or use offline")


def server_and_key() -> tuple[str, bool]:
    """Return the address of wandb's server, and whether wandb has a key for it, as another process finds out.

    Raises:
        OSError, SubprocessError: it does not start, fails, or needs more than ASK_S seconds.
    """
    done = subprocess.run(
        [sys.executable, "-m", "hpcgpt.tracking.wandb_process", "--settings"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ASK_S, check=True,
    )  # fmt: skip
    server, _, has_key = done.stdout.strip().rpartition("\n")[2].partition(" ")
    return server, has_key == "True"


def check_tensorboard(wanted: bool) -> None:
    """Raise UserError if tracking.tensorboard is set, and the package that writes event files is missing."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise UserError("tracking.tensorboard needs the package tensorboard: pip install 'hpcgpt[tensorboard]'")


def _disabled(wanted: str) -> bool:
    # wandb itself reads the rest of its settings; this one is read here to save a process.
    return wanted == "disabled" or (wanted == "auto" and os.environ.get("WANDB_MODE") == "disabled")


def sync_command(folder: Path) -> str:
    return f"python -m hpcgpt.tracking sync {folder}"
