"""hpcgpt.distributed.core_wait: a rank whose threads have no cores of their own warns, once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from hpcgpt.distributed import core_wait
from hpcgpt.distributed.core_wait import CoreWait

NOT_COUNTED = core_wait.waited_s() is None


@pytest.fixture
def busy_core() -> Iterator[None]:
    """Bind this thread to one core, on which another process computes."""
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # which inherits the core
    try:
        yield
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, allowed)


def warnings(check: CoreWait, limit_s: float) -> list[str]:
    """Compute until there is a warning, and a bit longer, or for `limit_s`."""
    found: list[str] = []
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if warning := check.warning():
            found.append(warning)
            end = min(end, time.monotonic() + 0.3)
    return found


@pytest.mark.processes
@pytest.mark.skipif(NOT_COUNTED, reason="this kernel does not count how long threads wait for a core")
@pytest.mark.usefixtures("busy_core")
def test_a_rank_with_several_threads_on_a_busy_core_warns_once() -> None:
    (warning,) = warnings(CoreWait(threads=2, every_s=0.05), limit_s=100.0)
    assert "other work keeps the cores busy" in warning
    assert "with --run.threads 1" in warning


@pytest.mark.processes
@pytest.mark.usefixtures("busy_core")
def test_a_single_thread_has_nobody_to_wait_for() -> None:
    assert warnings(CoreWait(threads=1, every_s=0.01), limit_s=0.3) == []


@pytest.mark.skipif(NOT_COUNTED, reason="this kernel does not count how long threads wait for a core")
def test_waiting_for_something_else_does_not_count() -> None:
    before = core_wait.waited_s()
    threading.Event().wait(0.5)  # as for a disk, another rank or another thread
    after = core_wait.waited_s()
    assert before is not None
    assert after is not None
    assert after - before < 0.25  # of the 0.5 s; on busy cores the thread waits a moment for one
