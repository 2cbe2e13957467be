"""hpcgpt.preempt: signals become one agreed reason, and children are kept from them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, clean_env, on_ranks

from hpcgpt import preempt, world
from hpcgpt.preempt import SIGNALS, Stop, StopFlag, leave_at, shielded
from hpcgpt.world import Ranks

ALONE = Ranks(world.World(0, 0, 1, 1, "alone", "test"), torch.device("cpu"), None)

# After each line on stdin it tells its reason.
ASK = """
import sys
from hpcgpt.preempt import StopFlag
flag = StopFlag(None, 60.0, {})
flag.install()
print("ready", flush=True)
for _ in sys.stdin:
    print(flag.here().name, flush=True)
"""


class Asked:
    """A process with our handlers, to send signals to and to ask."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", ASK], cwd=ROOT, env=clean_env(), text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def after(self, *numbers: signal.Signals) -> str:
        """The reason it gives after these signals, one after the other; '' if it has left."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        answer = ""
        for number in numbers:
            self.process.send_signal(number)
            try:
                self.process.stdin.write("\n")
            except BrokenPipeError:
                return ""
            answer = self.process.stdout.readline().strip()
        return answer


@pytest.fixture
def asked() -> Iterator[Asked]:
    process = Asked()
    yield process
    process.process.kill()
    process.process.communicate()


@pytest.fixture
def handlers() -> Iterator[None]:
    """This process's own handlers, put back afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([signal.SIGUSR1], "TIME_LIMIT"),
        ([signal.SIGUSR2], "TIME_LIMIT"),
        ([signal.SIGINT], "INTERRUPT"),
        ([signal.SIGTERM], "TERMINATED"),
        ([signal.SIGTERM, signal.SIGTERM], "TERMINATED"),
        ([signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2], "TIME_LIMIT"),
        ([signal.SIGUSR1, signal.SIGTERM], "TERMINATED"),
        ([signal.SIGTERM, signal.SIGUSR1], "TERMINATED"),
        ([signal.SIGTERM, signal.SIGINT], "TERMINATED"),
        ([signal.SIGUSR1, signal.SIGINT], "INTERRUPT"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(number.name for number in value),
)
def test_each_signal_gives_its_reason_and_the_largest_counts(
    asked: Asked, numbers: list[signal.Signals], reason: str
) -> None:
    assert asked.after(*numbers) == reason
    assert asked.process.poll() is None


@pytest.mark.parametrize(
    "before", [[], [signal.SIGUSR1], [signal.SIGTERM]], ids=["at-once", "after-USR1", "after-TERM"]
)
def test_a_second_ctrl_c_leaves_at_once(asked: Asked, before: list[signal.Signals]) -> None:
    assert asked.after(*before, signal.SIGINT) != ""
    assert asked.after(signal.SIGINT) == ""
    assert asked.process.wait(10) == 130


def test_without_a_reason_there_is_none(tmp_path: Path) -> None:
    flag = StopFlag(tmp_path / "STOP", 60.0, {})
    assert flag.here() == flag.agree(ALONE) == Stop.NO
    assert not flag.agree(ALONE)
    assert Stop.NO.words == ""
    assert all(reason.words for reason in Stop if reason)


@pytest.mark.parametrize(
    ("end", "now", "margin_s", "expected"),
    [
        (1000.0, 0.0, 60.0, 940.0),
        (300.0, 0.0, 60.0, 240.0),
        (100.0, 0.0, 60.0, 80.0),
        (1000.0, 990.0, 60.0, 998.0),
        (1000.0, 0.0, 0.0, 1000.0),
        (1000.0, 2000.0, 60.0, 1000.0),
    ],
)
def test_a_job_leaves_a_margin_before_its_end_but_no_more_than_a_fifth_of_its_time(
    end: float, now: float, margin_s: float, expected: float
) -> None:
    assert leave_at(end, now, margin_s) == expected


def test_near_the_end_of_the_job_the_clock_says_stop() -> None:
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(time.time()) + 2)})
    assert flag.here() == Stop.NO
    time.sleep(2)
    assert flag.here() == flag.agree(ALONE) == Stop.TIME_LIMIT


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "Unknown"}])
def test_without_an_end_the_clock_says_nothing(env: dict[str, str]) -> None:
    assert StopFlag(None, 1e9, env).agree(ALONE) == Stop.NO


def test_a_stop_file_counts_when_it_is_looked_for_and_less_than_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {"SLURM_JOB_END_TIME": "1"}
    flag, hurried = StopFlag(tmp_path / "STOP", 60.0, {}), StopFlag(tmp_path / "STOP", 60.0, late)
    monkeypatch.setattr(preempt, "LOOK_EVERY_S", 0.0)
    assert flag.here() == Stop.NO
    (tmp_path / "STOP").touch()
    assert flag.here() == flag.agree(ALONE) == Stop.FILE
    assert hurried.here() == Stop.TIME_LIMIT


def test_a_stop_file_is_looked_for_at_once_and_then_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preempt, "LOOK_EVERY_S", 1e9)
    early = StopFlag(tmp_path / "STOP", 60.0, {})
    assert early.here() == Stop.NO
    (tmp_path / "STOP").touch()
    assert early.here() == Stop.NO
    assert StopFlag(tmp_path / "STOP", 60.0, {}).here() == Stop.FILE


def test_a_file_system_that_does_not_answer_for_a_moment_stops_nobody(tmp_path: Path) -> None:
    """No errno of a missing file: a name that is too long is one that can be had without a broken file system."""
    assert StopFlag(tmp_path / ("x" * 300), 60.0, {}).here() == Stop.NO


@pytest.mark.parametrize(
    ("left_s", "margin_s", "save_s", "leads_s"),
    [
        (10_000, 60.0, 1.0, None),  # 2 saves and some slack fit into the margin
        (10_000, 60.0, 25.0, None),
        (10_000, 60.0, 100.0, 210.0),
        (10_000, 300.0, 100.0, None),
        (10_000, 0.0, 0.0, 10.0),
        (1000, 60.0, 400.0, 500.0),  # half of the job at most
        (100, 60.0, 1.0, None),  # a short job's margin is a fifth: 20 s
        (100, 60.0, 30.0, 50.0),
    ],
)
def test_a_save_that_would_not_fit_is_begun_earlier(
    left_s: int, margin_s: float, save_s: float, leads_s: float | None
) -> None:
    now = time.time()
    flag = StopFlag(None, margin_s, {"SLURM_JOB_END_TIME": str(int(now) + left_s)})
    lead_s = flag.save_takes(save_s)
    assert (lead_s is None) == (leads_s is None), lead_s
    assert lead_s == pytest.approx(leads_s, abs=1.0)
    assert flag.save_takes(save_s) is None, "told twice"
    assert flag.save_takes(save_s / 2) is None, "a quicker save puts nothing off"
    assert flag.here() == Stop.NO


def test_a_slow_save_makes_the_clock_say_stop() -> None:
    flag = StopFlag(None, 1.0, {"SLURM_JOB_END_TIME": str(int(time.time()) + 3)})
    assert flag.here() == Stop.NO
    assert flag.save_takes(1000.0) == pytest.approx(1.5, abs=0.6)
    time.sleep(2)
    assert flag.here() == Stop.TIME_LIMIT


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_END_TIME": "Unknown"}])
def test_without_an_end_no_save_is_too_slow(env: dict[str, str]) -> None:
    flag = StopFlag(None, 60.0, env)
    assert flag.save_takes(1e9) is None
    assert flag.here() == Stop.NO


# --- several ranks ---------------------------------------------------------------------------------


def test_the_largest_reason_of_all_ranks_counts_on_all_ranks_and_in_the_same_round(tmp_path: Path) -> None:
    done = on_ranks(4, "tests.ranks_preempt", str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(4)]
    for rank in told:
        assert rank["agreed"] == {
            "nobody": "NO",
            "the last rank alone": "TIME_LIMIT",
            "two ranks with different reasons": "TERMINATED",
            "every rank the same": "TIME_LIMIT",
            "one rank twice": "TERMINATED",
            "a file that only rank 0 looks for": "FILE",
        }
        assert rank["rounds"] == told[0]["rounds"]
    assert len(set(told[0]["rounds"])) > 1


# --- children --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_child_started_in_the_shield_is_deaf_to_our_signals(number: signal.Signals) -> None:
    StopFlag(None, 60.0, {}).install()
    child = "import time; print('up', flush=True); time.sleep(0.2); print('lives', flush=True)"
    with shielded():
        kept = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
    bare = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for process in (kept, bare):
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
    assert kept.communicate() == (b"lives\n", None)
    assert kept.returncode == 0
    assert bare.communicate() == (b"", None), "without the shield it would live too, so this shows nothing"


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_comes_within_the_shield_reaches_us_afterwards() -> None:
    flag = StopFlag(None, 60.0, {})
    flag.install()
    with shielded():
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.here() == Stop.TERMINATED


def test_the_shield_is_taken_down_also_when_the_start_of_a_child_fails() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(FileNotFoundError), shielded():
        subprocess.run(["no-such-program-anywhere"], check=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert not before & set(SIGNALS)


def test_a_signal_that_was_blocked_from_the_start_is_heard_once_the_handlers_are_there() -> None:
    """The batch script starts a rank so: a signal that comes while Python is being loaded waits."""
    code = (
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); from hpcgpt import preempt\n"
        "flag = preempt.StopFlag(None, 60, env={}); flag.install(); print(flag.here().name)"
    )
    block = ["env", "--block-signal=TERM,INT,USR1,USR2", "bash", "-c", 'trap "" TERM; exec "$@"', "bash"]
    done = subprocess.run([*block, sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("TERMINATED\n", 0), done.stderr
