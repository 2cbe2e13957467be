"""hpcgpt.distributed.stop_signals: signals become one agreed reason to stop, and child processes are shielded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcgpt.distributed import stop_signals
from hpcgpt.distributed.stop_signals import REASONS, SIGNALS, Stop, StopFlag, elected, leave_at, shielded
from tests.one_rank import ALONE
from tests.programs import ROOT, clean_env, on_ranks

# Prints its reason to stop after each line on stdin.
ASK = """
import sys
from hpcgpt.distributed.stop_signals import StopFlag
flag = StopFlag(None, 60.0, {})
flag.install()
print("ready", flush=True)
for _ in sys.stdin:
    print(flag.here().name, flush=True)
"""


class ProcessWithHandlers:
    """A process with our handlers, which gets signals and reports its reason."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", ASK], cwd=ROOT, env=clean_env(), text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def after(self, *numbers: signal.Signals) -> str:
        """Return its reason after these signals, one after the other; '' if it has exited."""
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
def process_with_handlers() -> Iterator[ProcessWithHandlers]:
    made = ProcessWithHandlers()
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restore this process's own handlers afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- one process -----------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([signal.SIGUSR1], "TIME_LIMIT"),
        ([signal.SIGUSR2], "TIME_LIMIT"),
        ([signal.SIGINT], "INTERRUPT"),
        ([signal.SIGHUP], "TERMINATED"),
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
def test_each_signal_has_its_reason_and_the_largest_counts(
    process_with_handlers: ProcessWithHandlers, numbers: list[signal.Signals], reason: str
) -> None:
    assert process_with_handlers.after(*numbers) == reason
    assert process_with_handlers.process.poll() is None


@pytest.mark.processes
@pytest.mark.parametrize(
    "before", [[], [signal.SIGUSR1], [signal.SIGTERM]], ids=["at-once", "after-USR1", "after-TERM"]
)
def test_a_second_ctrl_c_exits_at_once(
    process_with_handlers: ProcessWithHandlers, before: list[signal.Signals]
) -> None:
    assert process_with_handlers.after(*before, signal.SIGINT) != ""
    assert process_with_handlers.after(signal.SIGINT) == ""
    assert process_with_handlers.process.wait(10) == 130


def test_without_a_reason_there_is_none(tmp_path: Path) -> None:
    flag = StopFlag(tmp_path / "STOP", 60.0, {})
    assert flag.here() == flag.agree(ALONE) == Stop.NO
    assert not flag.agree(ALONE)
    assert Stop.NO.message == ""
    assert all(reason.message for reason in Stop if reason)


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
def test_a_job_stops_a_margin_before_its_end_but_at_most_a_fifth_of_its_time(
    end: float, now: float, margin_s: float, expected: float
) -> None:
    assert leave_at(end, now, margin_s) == expected


def test_near_the_end_of_the_job_the_reason_is_the_time_limit() -> None:
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(time.time()) + 2)})
    assert flag.here() == Stop.NO
    time.sleep(2)
    assert flag.here() == flag.agree(ALONE) == Stop.TIME_LIMIT


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "Unknown"}])
def test_without_an_end_there_is_no_time_limit(env: dict[str, str]) -> None:
    assert StopFlag(None, 1e9, env).agree(ALONE) == Stop.NO


def test_a_stop_file_counts_less_than_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"SLURM_JOB_END_TIME": "1"}
    flag, late = StopFlag(tmp_path / "STOP", 60.0, {}), StopFlag(tmp_path / "STOP", 60.0, env)
    monkeypatch.setattr(stop_signals, "LOOK_EVERY_S", 0.0)
    assert flag.here() == Stop.NO
    (tmp_path / "STOP").touch()
    assert flag.here() == flag.agree(ALONE) == Stop.FILE
    assert late.here() == Stop.TIME_LIMIT


def test_a_stop_file_is_looked_for_at_once_and_then_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_signals, "LOOK_EVERY_S", 1e9)
    early = StopFlag(tmp_path / "STOP", 60.0, {})
    assert early.here() == Stop.NO
    (tmp_path / "STOP").touch()
    assert early.here() == Stop.NO
    assert StopFlag(tmp_path / "STOP", 60.0, {}).here() == Stop.FILE


def test_a_file_system_error_is_no_reason_to_stop(tmp_path: Path) -> None:
    """ENAMETOOLONG stands in for the errors of a broken file system, which is not a missing file."""
    assert StopFlag(tmp_path / ("x" * 300), 60.0, {}).here() == Stop.NO


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Both clocks as stop_signals reads them; a test moves them."""
    now = [1_000_000.0]
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0]))
    yield now


def run_until_stop(flag: StopFlag, clock: list[float], steps_s: Sequence[float]) -> float:
    """Step until the flag says stop, polling after each step; return the time of the stop."""
    flag.look_from_now()
    for step_s in steps_s:
        clock[0] += step_s
        if flag.agree(ALONE, after_step=True):
            return clock[0]
    raise AssertionError("never asked to stop")


@pytest.mark.parametrize(
    ("left_s", "margin_s", "save_s", "step_s", "leads_s"),
    [
        (10_000, 60.0, 1.0, 0.1, 60.0),  # 2 saves and some slack fit into the margin
        (10_000, 60.0, 25.0, 0.0, 60.0),
        (10_000, 60.0, 100.0, 0.0, 210.0),
        (10_000, 300.0, 100.0, 0.0, 300.0),
        (10_000, 0.0, 0.0, 0.0, 10.0),
        (10_000, 60.0, 0.0, 80.0, 110.0),  # a whole step passes between two polls
        (10_000, 60.0, 20.0, 80.0, 150.0),
        (1000, 60.0, 400.0, 0.0, 500.0),  # half of the job at most
        (1000, 60.0, 0.0, 700.0, 500.0),
        (100, 60.0, 1.0, 0.0, 20.0),  # a short job's margin is a fifth
        (100, 60.0, 30.0, 0.0, 50.0),
    ],
)
def test_a_step_and_its_saves_fit_before_the_end(
    clock: list[float], left_s: int, margin_s: float, save_s: float, step_s: float, leads_s: float
) -> None:
    end = clock[0] + left_s
    flag = StopFlag(None, margin_s, {"SLURM_JOB_END_TIME": str(int(end))})
    flag.save_takes(save_s)
    flag.save_takes(save_s / 2)  # a faster save does not postpone the stop
    flag.look_from_now()
    clock[0] += step_s
    flag.agree(ALONE, after_step=True)
    assert end - flag.leave_at == pytest.approx(leads_s)


@pytest.mark.parametrize(("late_steps", "leads_s"), [(0, 110.0), (1, 210.0), (2, 310.0)])
def test_steps_until_the_votes_are_known_fit_before_the_end_too(
    clock: list[float], late_steps: int, leads_s: float
) -> None:
    end = clock[0] + 10_000
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(end))})
    flag.late_steps = late_steps
    flag.look_from_now()
    clock[0] += 80.0
    assert flag.votes(ALONE) == [0.0] * len(REASONS)
    assert end - flag.leave_at == pytest.approx(leads_s)


@pytest.mark.parametrize(
    ("of_ranks", "expected"),
    [
        ([[], []], Stop.NO),
        ([[Stop.FILE], []], Stop.FILE),
        ([[Stop.FILE], [Stop.TERMINATED], [Stop.INTERRUPT]], Stop.TERMINATED),
        ([[Stop.TIME_LIMIT]] * 1000 + [[Stop.INTERRUPT]], Stop.INTERRUPT),
    ],
)
def test_of_the_votes_of_all_ranks_the_largest_reason_counts_and_not_the_most_frequent(
    of_ranks: list[list[Stop]], expected: Stop
) -> None:
    sums = [0.0] * len(REASONS)
    for reasons in of_ranks:
        flag = StopFlag(None, 60.0, {})
        flag._told = max(reasons, default=Stop.NO)
        sums = [total + vote for total, vote in zip(sums, flag.votes(ALONE), strict=True)]
    assert sum(sums) == sum(map(len, of_ranks))
    assert elected(sums) == expected


@pytest.mark.slow
@pytest.mark.parametrize("step_s", [1.0, 30.0, 90.0, 300.0])
def test_with_steps_of_any_length_the_run_stops_in_time_for_a_save(clock: list[float], step_s: float) -> None:
    """With the margin alone, 60 s, the last poll could be 90 s before the end."""
    for offset in range(0, 300, 7):
        end = clock[0] + 7200 + offset
        flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(end))})
        flag.save_takes(20.0)
        stop_at = run_until_stop(flag, clock, [step_s] * 10_000)
        assert stop_at + 2 * 20.0 <= end
        assert end - stop_at <= 1.25 * step_s + max(60.0, 50.0) + step_s, "much earlier than necessary"
        clock[0] = end


def test_a_single_long_step_is_forgotten_after_some_steps(clock: list[float]) -> None:
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(clock[0]) + 100_000)})
    flag.look_from_now()
    for step_s in (1.0, 2000.0, 1.0):
        clock[0] += step_s
        flag.agree(ALONE, after_step=True)
    assert flag.step_s == 2000.0
    for _ in range(stop_signals.RECENT):
        clock[0] += 1.0
        flag.agree(ALONE, after_step=True)
    assert flag.step_s == 1.0


def test_a_single_slow_save_is_forgotten_after_some_saves(clock: list[float]) -> None:
    """Other jobs made the file system slow for a while: that must not make the run stop early forever."""
    end = clock[0] + 100_000
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(end))})
    for seconds in [20.0, 900.0, *[20.0] * (stop_signals.RECENT_SAVES - 1)]:
        flag.save_takes(seconds)
    assert end - flag.leave_at == 2 * 900.0 + stop_signals.SLACK_S
    flag.save_takes(30.0)
    assert end - flag.leave_at == 2 * 30.0 + stop_signals.SLACK_S


def test_polls_between_the_batches_of_an_evaluation_do_not_count_as_steps(clock: list[float]) -> None:
    flag = StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(clock[0]) + 100_000)})
    flag.look_from_now()
    clock[0] += 90.0
    flag.agree(ALONE, after_step=True)
    for _ in range(1000):
        clock[0] += 0.1
        flag.agree(ALONE)
    assert flag.step_s == 90.0
    clock[0] += 80.0
    flag.agree(ALONE, after_step=True)
    assert list(flag._gaps) == [90.0, 80.0]


@pytest.mark.parametrize("env", [{}, {"SLURM_JOB_END_TIME": "Unknown"}])
def test_without_an_end_no_save_or_step_is_too_slow(clock: list[float], env: dict[str, str]) -> None:
    flag = StopFlag(None, 60.0, env)
    flag.save_takes(1e9)
    flag.look_from_now()
    clock[0] += 1e9
    assert flag.agree(ALONE, after_step=True) == Stop.NO
    assert flag.lead_s == 0.0


@pytest.mark.processes
def test_under_nohup_sighup_stays_ignored() -> None:
    """nohup makes a program begin with SIGHUP ignored."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen([sys.executable, "-c", ignoring, sys.executable, "-c", ASK], cwd=ROOT, env=clean_env(),
                               text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("\n", timeout=20)[0] == "NO\n"
    assert process.returncode == 0


# --- several ranks ---------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_largest_reason_of_all_ranks_counts_on_all_ranks_in_the_same_round(tmp_path: Path) -> None:
    done = on_ranks(4, "tests.distributed.ranks_stop_signals", str(tmp_path))
    assert done.returncode == 0, done.stderr
    reported = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(4)]
    for rank in reported:
        assert rank["agreed"] == {
            "no rank": "NO",
            "the last rank alone": "TIME_LIMIT",
            "two ranks with different reasons": "TERMINATED",
            "every rank the same": "TIME_LIMIT",
            "one rank twice": "TERMINATED",
            "a file that only rank 0 looks for": "FILE",
            "the clock of rank 0": "TIME_LIMIT",
            "the clock of another rank": "NO",
        }
        assert rank["rounds"] == reported[0]["rounds"]
    assert len(set(reported[0]["rounds"])) > 1


# --- child processes -------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_child_started_in_the_shield_does_not_get_our_signals(number: signal.Signals) -> None:
    StopFlag(None, 60.0, {}).install()
    child = "import sys; print('up', flush=True); sys.stdin.readline(); print('survived', flush=True)"
    with shielded():
        kept = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    bare = subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for process in (kept, bare):
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
    assert kept.communicate(b"\n")[0] == b"survived\n"
    assert kept.returncode == 0
    assert bare.communicate(b"\n")[0] == b"", "it survived without the shield, so this proves nothing"


@pytest.mark.usefixtures("handlers")
def test_a_signal_within_the_shield_is_handled_afterwards() -> None:
    flag = StopFlag(None, 60.0, {})
    flag.install()
    with shielded():
        os.kill(os.getpid(), signal.SIGTERM)
    assert flag.here() == Stop.TERMINATED


@pytest.mark.processes
def test_the_shield_is_removed_also_when_the_start_of_a_child_fails() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(FileNotFoundError), shielded():
        subprocess.run(["no-such-program-anywhere"], check=True)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert not before & set(SIGNALS)


@pytest.mark.processes
def test_a_signal_that_was_blocked_from_the_start_is_handled_once_there_are_handlers() -> None:
    """The batch script starts ranks like this: a signal that arrives while Python loads stays pending."""
    code = (
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); from hpcgpt.distributed import stop_signals\n"
        "flag = stop_signals.StopFlag(None, 60, env={}); flag.install(); print(flag.here().name)"
    )
    block = ["env", "--block-signal=TERM,INT,USR1,USR2", "bash", "-c", 'trap "" TERM; exec "$@"', "bash"]
    done = subprocess.run([*block, sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("TERMINATED\n", 0), done.stderr
