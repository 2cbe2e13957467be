"""hpcgpt.slurm.job_end: a time limit that is changed while the job runs is noticed, and Slurm is asked rarely."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcgpt.distributed import stop_signals
from hpcgpt.distributed.stop_signals import Stop, StopFlag
from hpcgpt.slurm import job_end
from hpcgpt.slurm.job_end import BEFORE_S, EVERY_S, LOOK_S, JobEnd
from tests.one_rank import ALONE
from tests.programs import command

DAY_S = 86_400


class Controller:
    """An scontrol whose answers the test sets, and which records its calls."""

    def __init__(self, folder: Path) -> None:
        self.bin, self._calls = folder / "bin", folder / "calls"
        self.bin.mkdir()

    def answers(self, line: str, status: int = 0) -> None:
        program = self.bin / "scontrol"
        program.write_text(f"#!/bin/sh\necho \"$@\" >> {self._calls}\necho '{line}'\nexit {status}\n")
        program.chmod(0o755)

    def ends(self, end: float, state: str = "RUNNING") -> None:
        self.answers(f"JobId=7 JobName=x JobState={state} EndTime={int(end)}")

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Controller:
    made = Controller(tmp_path)
    monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Both clocks as the code reads them; a test moves them."""
    now = [1_000_000.0]
    seen = SimpleNamespace(
        time=lambda: now[0], monotonic=lambda: now[0], strftime=time.strftime, localtime=time.localtime
    )
    monkeypatch.setattr(stop_signals, "time", seen)
    monkeypatch.setattr(job_end, "time", seen)
    yield now


def stop_flag_for(end: float) -> StopFlag:
    return StopFlag(None, 60.0, {"SLURM_JOB_END_TIME": str(int(end))})


@pytest.mark.processes
def test_a_run_whose_time_limit_was_extended_uses_the_time(slurm: Controller, tiny: Path) -> None:
    slurm.ends(time.time() + DAY_S)
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": "1", "PATH": f"{slurm.bin}:/usr/bin:/bin"}
    done = command("hpcgpt.train", str(tiny), env=env)
    assert done.returncode == 0, done.stderr
    assert slurm.calls == ["show job 7"]
    assert "warning: Slurm now ends this job at " in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("new", [DAY_S + 7200, 3600, 300])
def test_a_changed_time_limit_is_noticed_at_the_next_query(slurm: Controller, clock: list[float], new: int) -> None:
    began = clock[0]
    flag = stop_flag_for(began + DAY_S)
    job_end_query = JobEnd("7", flag)
    slurm.ends(began + new)
    job_end_query.ask_if_due()
    clock[0] += EVERY_S - 1
    job_end_query.ask_if_due()
    assert flag.end == began + DAY_S
    assert slurm.calls == []
    clock[0] += 1
    job_end_query.ask_if_due()
    assert flag.end == began + new
    assert flag.agree(ALONE) == (Stop.TIME_LIMIT if new < EVERY_S else Stop.NO)
    clock[0] = began + DAY_S
    assert flag.agree(ALONE) == (Stop.TIME_LIMIT if new < DAY_S else Stop.NO)


@pytest.mark.processes
def test_shortly_before_its_end_slurm_is_asked_once_for_each_end(slurm: Controller, clock: list[float]) -> None:
    began = clock[0]
    flag = stop_flag_for(began + 550)
    job_end_query = JobEnd("7", flag)
    slurm.ends(began + 550)
    clock[0] = flag.leave_at - BEFORE_S - 1
    job_end_query.ask_if_due()
    assert slurm.calls == []
    for _ in range(3):
        clock[0] += 1
        job_end_query.ask_if_due()
    assert len(slurm.calls) == 1
    assert flag.agree(ALONE) == Stop.NO
    flag.ends_at(began + 1000)
    clock[0] = flag.leave_at - BEFORE_S
    slurm.ends(began + 2000)
    job_end_query.ask_if_due()
    job_end_query.ask_if_due()
    assert len(slurm.calls) == 2
    assert flag.end == began + 2000


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1),
        ("slurm_load_jobs error: Invalid job id specified", 1),
        ("", 0),
        ("JobId=7 JobName=x JobState=RUNNING EndTime=Unknown", 0),
        ("JobId=7 JobName=x JobState=RUNNING", 0),
        ("JobId=7 JobName=x JobState=COMPLETING EndTime=1000", 0),  # Slurm is ending it: that is not the limit
        ("JobId=7 JobName=x JobState=PENDING EndTime=1000", 0),
    ],
)
def test_an_answer_without_an_end_changes_nothing(
    slurm: Controller, clock: list[float], line: str, status: int
) -> None:
    flag = stop_flag_for(clock[0] + DAY_S)
    job_end_query = JobEnd("7", flag)
    slurm.answers(line, status)
    clock[0] += EVERY_S
    job_end_query.ask_if_due()
    assert len(slurm.calls) == 1
    assert flag.end == 1_000_000.0 + DAY_S


@pytest.mark.processes
def test_without_scontrol_nothing_changes(clock: list[float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    flag = stop_flag_for(clock[0] + DAY_S)
    job_end_query = JobEnd("7", flag)
    clock[0] += EVERY_S
    job_end_query.ask_if_due()
    assert flag.end == 1_000_000.0 + DAY_S


@pytest.mark.processes
def test_slurm_is_asked_rarely_in_a_day_even_if_it_never_answers(slurm: Controller, clock: list[float]) -> None:
    flag = stop_flag_for(clock[0] + DAY_S)
    job_end_query = JobEnd("7", flag)
    slurm.answers("", 1)
    while clock[0] < flag.end:
        job_end_query.ask_if_due()
        clock[0] += LOOK_S
    assert len(slurm.calls) == pytest.approx(DAY_S / EVERY_S, abs=1)


@pytest.mark.processes
def test_an_end_missing_from_the_environment_is_asked_for_at_once_in_another_thread(slurm: Controller) -> None:
    answered, askers = threading.Event(), []

    class Flag(StopFlag):
        def ends_at(self, end: float) -> None:
            super().ends_at(end)
            askers.append(threading.current_thread())
            answered.set()

    flag = Flag(None, 60.0, {})
    slurm.ends(4_000_000_000)
    job_end.watch("7", flag)
    assert answered.wait(30)
    assert flag.end == 4_000_000_000
    assert askers != [threading.current_thread()]
