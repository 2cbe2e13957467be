"""hpcgpt.training.hang_watchdog: a real process that hangs reports where, and ends; a stopped or slow one continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcgpt.config.operation import Watchdog
from hpcgpt.config.options import Config
from hpcgpt.distributed.world import World
from hpcgpt.exit_codes import FAILED
from hpcgpt.run import run_folder
from tests.programs import ROOT, clean_env

# A rank with a watchdog whose limit is 1.5 s of silence. REPORT_S is shortened: it is how long faulthandler waits
# beyond that when the GIL is held.
RANK = """
import ctypes, dataclasses, sys, threading, time
from hpcgpt.config import operation, options
from hpcgpt.training import hang_watchdog
from hpcgpt.distributed.world import World
run, mode, report_s, factor = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
hang_watchdog.REPORT_S, hang_watchdog.TICK_S = report_s, 0.2
settings = dataclasses.replace(options.Config(), run=options.Run(dir=run, name="tiny"),
                               watchdog=operation.Watchdog(hang_factor=factor, hang_min_s=1.5))
dog = hang_watchdog.Watchdog(settings, World(3, 0, 4, 1, "alone", "7_0"), 5)
for step in range(1, 6):
    dog.step(step)
time.sleep(0.5)  # a few ticks of the watchdog
dog.alive()
print("ready", flush=True)

def stuck_in_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def stuck_with_the_gil():
    ctypes.PyDLL(None).sleep(60)

if mode == "lock":
    stuck_in_a_lock()
elif mode == "gil":
    stuck_with_the_gil()
elif mode == "off":
    dog.off()
    time.sleep(3)
elif mode == "never":
    time.sleep(3)
else:
    for _ in range(30):
        time.sleep(0.1)
        dog.alive()
dog.off()
print("alive", flush=True)
"""


@contextmanager
def rank(run: Path, mode: str, report_s: float = 1.0, factor: float = 2.0) -> Iterator[subprocess.Popen[str]]:
    (run / "tiny").mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", RANK, str(run), mode, str(report_s), str(factor)], cwd=ROOT,
                               env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.processes
def test_a_rank_that_hangs_writes_its_stacks_and_an_event_and_fails(tmp_path: Path) -> None:
    with rank(tmp_path, "lock") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == FAILED
    (stacks,) = (tmp_path / "tiny/faults").rglob("rank_00003.stacks.txt")
    assert "stuck_in_a_lock" in stacks.read_text()
    assert "_watch" in stacks.read_text(), "all threads"
    assert "hang: nothing for " in stderr
    assert f"its stacks are in {stacks}" in stderr
    (event,) = run_folder.events(tmp_path / "tiny")
    assert (event["event"], event["attempt"], event["rank"], event["step"]) == ("hang", 5, 3, 5)
    assert event["silent_s"] > 1.5


@pytest.mark.processes
def test_a_rank_that_hangs_with_the_gil_prints_its_stacks_and_fails_too(tmp_path: Path) -> None:
    with rank(tmp_path, "gil") as process:
        _, stderr = process.communicate(timeout=50)  # less than its sleep
    assert process.returncode == FAILED
    assert "stuck_with_the_gil" in stderr


@pytest.mark.processes
def test_a_rank_that_hangs_fails_also_where_the_folder_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/faults").write_text("in the way")
    with rank(tmp_path, "lock") as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert "hang: nothing for " in stderr


@pytest.mark.processes
def test_a_rank_that_was_stopped_for_longer_than_the_limit_continues(tmp_path: Path) -> None:
    with rank(tmp_path, "alive", report_s=60.0) as process:
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "alive\n", "")
    assert not (tmp_path / "tiny/faults").exists()


@pytest.mark.processes
def test_ctrl_z_stops_all_timers(tmp_path: Path) -> None:
    """Also the timer that needs no interpreter: it would fire after limit and REPORT_S, 2.5 s."""
    with rank(tmp_path, "alive") as process:
        process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "alive\n", "")
    assert not (tmp_path / "tiny/faults").exists()


@pytest.mark.processes
@pytest.mark.parametrize(("mode", "factor"), [("off", 2.0), ("never", 0.0), ("alive", 2.0)])
def test_a_rank_with_its_watchdog_off_or_with_steps_is_not_ended(tmp_path: Path, mode: str, factor: float) -> None:
    with rank(tmp_path, mode, factor=factor) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "alive\n", "")


@pytest.mark.parametrize(
    ("steps_s", "expected"),
    [([], 1800.0), ([1.0, 1.0], 1800.0), ([1.0, 1.0, 1.0], 300.0), ([20.0] * 5, 600.0), ([20.0, 20.0, 900.0], 600.0)],
)
def test_the_limit_follows_the_median_step_time(steps_s: list[float], expected: float) -> None:
    from hpcgpt.training import hang_watchdog

    settings = Config(watchdog=Watchdog(hang_factor=0.0))
    watchdog = hang_watchdog.Watchdog(settings, World(0, 0, 1, 1, "alone", "test"), 1)
    watchdog._settings = Config()
    watchdog._steps_s.extend(steps_s)
    assert watchdog.limit_s == expected
