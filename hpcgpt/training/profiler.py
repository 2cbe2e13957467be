"""Traces some steps of rank 0: what its CPU and its GPU do, kernel by kernel.

``profile.steps`` chooses the steps. To trace the next steps of a running job, create a file PROFILE in its run folder,
with the number of steps in it (default: 3). The results are for Perfetto or chrome://tracing, and
pytorch.org/memory_viz::

    profile/steps_000000100_to_000000102.json.gz        the trace
    profile/steps_000000100_to_000000102.memory         on a GPU: every allocation
    profile/PROFILE.step_000000100                      the file PROFILE, renamed

The other ranks are not traced, and wait for rank 0 in collectives, which its trace includes. If a trace cannot be
written, the run continues with a warning.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hpcgpt.output import streams

REQUEST = "PROFILE"
LOOK_EVERY_S = 2.0  # between checks for the file PROFILE: a network file system is slow
DEFAULT_STEPS, MOST_STEPS = 3, 100  # a trace has megabytes for each step


class Profiler:
    """Traces steps. Rank 0 calls `before` and `after` for each step, counted from 1."""

    def __init__(self, run: Path, steps: range, device: torch.device) -> None:
        self._run, self._folder, self._steps = run, run / "profile", steps
        self._on_gpu = device.type == "cuda"
        self._next_look = 0.0
        self._running: profile | None = None

    def before(self, step: int) -> None:
        """Start the trace that begins with `step`, if any."""
        if self._running is None and step not in self._steps and time.monotonic() >= self._next_look:
            self._read_request(step)
        if self._running is None and step in self._steps:
            self._steps = range(step, self._steps.stop)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=200_000)
            self._running = profile(activities=activities, record_shapes=True, profile_memory=not self._on_gpu)
            self._running.start()

    def after(self, step: int, leaving: bool = False) -> str:
        """Write the trace that ends with `step`, if any; return its path, or ''. `leaving`: end it here in any case."""
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
            if self._on_gpu:  # else every allocation until the end of the run would be recorded
                torch.cuda.memory._record_memory_history(enabled=None)
        return str(path)

    def _read_request(self, step: int) -> None:
        """Read the file PROFILE, if there is one, and rename it: trace from `step` on."""
        self._next_look = time.monotonic() + LOOK_EVERY_S
        request = self._run / REQUEST
        if not os.path.exists(request):  # noqa: PTH110 (False during an outage of the file system)
            return
        try:
            content = request.read_text().strip()
            self._folder.mkdir(exist_ok=True)
            request.rename(self._folder / f"{REQUEST}.step_{step:09d}")
        except (OSError, UnicodeDecodeError) as error:
            streams.warn(f"{request}: {error}")
            return
        if content and not (content.isdecimal() and 1 <= int(content) <= MOST_STEPS):
            streams.warn(f"{request} contains {content[:80]!r}, expected a number of steps from 1 to {MOST_STEPS}")
            return
        self._steps = range(step, step + int(content or DEFAULT_STEPS))
