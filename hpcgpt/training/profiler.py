"""Traces of some steps of rank 0, on request: what its CPU and its GPU did, kernel by kernel.

Asked for by ``profile.steps``, or of a job that runs already by a file PROFILE laid into its run folder, with the
number of steps in it (default: 3). What comes of it, for Perfetto or chrome://tracing, and pytorch.org/memory_viz::

    profile/steps_000000100_to_000000102.json.gz        the trace
    profile/steps_000000100_to_000000102.memory         on a GPU: every allocation
    profile/PROFILE.step_000000100                      the request, as it was

The other ranks continue, and wait for rank 0 in their collectives: its trace shows those, too. A trace that
cannot be written costs a warning and not the run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hpcgpt.output import streams

REQUEST = "PROFILE"
LOOK_EVERY_S = 2.0  # a look at a network file system is not free
DEFAULT_STEPS, MOST_STEPS = 3, 100  # a trace grows by megabytes a step


class Profiler:
    """Traces steps of rank 0, which calls it before and after each step, counted from 1."""

    def __init__(self, run: Path, steps: range, device: torch.device) -> None:
        self._run, self._folder, self._steps = run, run / "profile", steps
        self._on_gpu = device.type == "cuda"
        self._next_look = 0.0
        self._running: profile | None = None

    def before(self, step: int) -> None:
        if self._running is None and step not in self._steps and time.monotonic() >= self._next_look:
            self._look(step)
        if self._running is None and step in self._steps:
            self._steps = range(step, self._steps.stop)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self._running = profile(activities=activities, record_shapes=True, profile_memory=not self._on_gpu)
            self._running.start()

    def after(self, step: int, leaving: bool = False) -> str:
        """Where the trace lies, if this was its last step, or the run is `leaving`, or going back; else ''."""
        if self._running is None or (step + 1 in self._steps and not leaving):
            return ""
        running, self._running = self._running, None
        running.stop()
        name = f"steps_{self._steps.start:09d}_to_{step:09d}"
        self._steps = range(0)
        path = self._folder / f"{name}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            temporary = path.with_name(f".{name}.json.gz")
            running.export_chrome_trace(str(temporary))
            temporary.rename(path)
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(path.with_name(f"{name}.memory")))  # type: ignore[no-untyped-call]
        except (OSError, RuntimeError) as error:
            streams.warn(f"the trace {path} is not written: {error}")
            return ""
        finally:
            if self._on_gpu:  # else every allocation until the run's end would be written down
                torch.cuda.memory._record_memory_history(enabled=None)
        return str(path)

    def _look(self, step: int) -> None:
        self._next_look = time.monotonic() + LOOK_EVERY_S
        request = self._run / REQUEST
        if not os.path.exists(request):  # noqa: PTH110 (a file system out of order for a moment says no)
            return
        try:
            words = request.read_text().strip()
            self._folder.mkdir(exist_ok=True)
            request.rename(self._folder / f"{REQUEST}.step_{step:09d}")
        except (OSError, UnicodeDecodeError) as error:
            streams.warn(f"{request}: {error}")
            return
        if words and not (words.isdecimal() and 1 <= int(words) <= MOST_STEPS):
            streams.warn(f"{request} asks for {words[:80]!r} steps, expected 1 to {MOST_STEPS}")
            return
        self._steps = range(step, step + int(words or DEFAULT_STEPS))
