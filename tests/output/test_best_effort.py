"""hpcgpt.output.best_effort: what only informs cannot end or delay a run; exit.json is written before any wait."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from hpcgpt.distributed import rendezvous
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.output import best_effort
from hpcgpt.output.best_effort import Worker, only_informs, within
from hpcgpt.run import run_folder
from hpcgpt.training import attempt, reporter, samples
from tests.output import broken_part
from tests.programs import Running, command
from tests.tiny_run import curve, rows


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_effort, "_warned", type(best_effort._warned)())


def test_any_exception_becomes_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    for error in (OSError(28, "No space left on device"), KeyError("x"), RuntimeError("CUDA out of memory")):
        with only_informs("the sample"):
            raise error
    assert capfd.readouterr().err.splitlines() == [
        "warning: the sample: No space left on device; training continues",
        "warning: the sample: KeyError: 'x'; training continues",
        "warning: the sample: RuntimeError: CUDA out of memory; training continues",
    ]


def test_a_warning_is_not_repeated_endlessly(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(100):
        with only_informs("events.jsonl"):
            raise OSError(28, "No space left on device")
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == best_effort.MOST_WARNINGS
    assert warnings[-1].endswith("no more such warnings are printed")


def test_a_worker_runs_actions_in_order_and_survives_their_exceptions(capfd: pytest.CaptureFixture[str]) -> None:
    worker, done = Worker("test"), []
    for number in range(5):
        worker.post("one", lambda number=number: done.append(number))  # type: ignore[misc]
        worker.post("two", lambda: 1 / 0)
    assert worker.drain(60)
    assert done == list(range(5))
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_an_action_that_hangs_blocks_neither_post_nor_drain(capfd: pytest.CaptureFixture[str],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(best_effort, "MOST_WAITING", 3)
    worker, resume, done = Worker("test"), threading.Event(), []
    started = threading.Event()
    worker.post("hangs", lambda: (started.set(), resume.wait()))
    assert started.wait(60)
    for number in range(5):
        worker.post("later", lambda number=number: done.append(number))  # type: ignore[misc]
    assert not worker.drain(0.01)
    assert capfd.readouterr().err.count("this one is dropped") == 2
    resume.set()
    assert worker.drain(60)
    assert done == [0, 1, 2]


def test_within_returns_none_without_an_answer(capfd: pytest.CaptureFixture[str]) -> None:
    never = threading.Event()
    assert within(60, "sum", lambda: 1 + 1) == 2
    assert within(60, "fails", lambda: 1 // 0) is None
    assert within(0.01, "hangs", lambda: never.wait()) is None
    warnings = capfd.readouterr().err
    assert "fails: ZeroDivisionError" in warnings
    assert "hangs: no answer within 0 s" in warnings
    never.set()


# --- real runs -------------------------------------------------------------------------------------


@pytest.mark.processes
def test_odd_events_do_not_end_a_finished_run(tiny: Path) -> None:
    """`started_at` was null where slurmctld did not answer: a finished run used to crash on it three times."""
    folder = tiny.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    odd = [{"time": 1.0, "event": "job", "job": "1_0", "started_at": None, "queued_at": None, "hosts": None},
           {"time": None, "event": "start", "attempt": None, "step": "x"}, {"time": 2.0, "event": 3}]  # fmt: skip
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in odd))
    done = command("hpcgpt.train", str(tiny))
    assert done.returncode == FINISHED, done.stderr
    assert run_folder.read_exit(folder) == run_folder.Exit("", FINISHED, "finished", 12, saved=True)
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.processes
@pytest.mark.parametrize("error", broken_part.ERRORS)
@pytest.mark.parametrize("part", broken_part.PARTS)
def test_nothing_that_informs_can_end_a_run(tiny: Path, part: str, error: str) -> None:
    """Each of them fails from the first step to the last."""
    done = command("tests.output.broken_part", part, error, str(tiny))
    folder = tiny.parent / "runs" / "tiny"
    assert done.returncode == FINISHED, done.stderr
    ended = run_folder.read_exit(folder)
    assert ended is not None
    assert (ended.status, ended.step, ended.saved) == (FINISHED, 12, True)
    assert (folder / "checkpoints/step_000000012/manifest.json").exists()
    assert len(curve(folder)) == (0 if part == "metrics file, also at a save" else 12)
    assert "training continues" in done.stderr or part == "console"


@pytest.mark.processes
def test_exit_json_is_written_before_goodput_is_waited_for(tiny: Path) -> None:
    """goodput never answers. exit.json comes first, and the run ends; waiting without a step is not a hang."""
    folder = tiny.parent / "runs" / "tiny"
    first = command("hpcgpt.train", str(tiny), "--train.steps", "8")
    assert first.returncode == FINISHED
    flags = ("--watchdog.hang_min_s", "3", "--watchdog.hang_factor", "1")
    done = command("tests.output.broken_part", "goodput", broken_part.HANGS, str(tiny), *flags)
    assert done.returncode == FINISHED
    assert "exit 12\n" in done.stdout
    assert "goodput: no answer within 7 s" in done.stderr
    assert f"goodput: see `python -m hpcgpt.status {folder}`" in done.stdout
    assert run_folder.read_exit(folder) == run_folder.Exit("", FINISHED, "finished", 12, saved=True)


@pytest.mark.parametrize(("megabytes", "limit_s"), [(None, 10.0), (0, 10.0), (50, 25.0), (97, 39.1), (10_000, 40.0)])
def test_the_time_for_goodput_grows_with_the_rows_up_to_a_limit(
    tmp_path: Path, megabytes: int | None, limit_s: float
) -> None:
    """A fixed limit is too short for long runs, whose goodput matters most."""
    if megabytes is not None:
        with open(tmp_path / "metrics.jsonl", "w") as file:
            file.truncate(megabytes * 1_000_000)
    assert reporter.goodput_limit_s(tmp_path) == pytest.approx(limit_s)
    assert reporter.DRAIN_S + reporter.GOODPUT_MOST_S < attempt.LAST_REPORT_S


@pytest.mark.parametrize(("wanted_s", "hang_s", "limit_s"), [(30, 300, 30), (200, 300, 150), (7200, 36_000, 300)])
def test_a_sample_ends_before_the_other_ranks_consider_it_a_hang(wanted_s: int, hang_s: int, limit_s: float) -> None:
    """They wait in a collective, which has a time limit of its own, also where the watchdog's is long."""
    assert samples.sample_limit_s(wanted_s, hang_s) == limit_s
    assert limit_s < rendezvous.COLLECTIVE_TIMEOUT.total_seconds()


@pytest.mark.processes
def test_a_long_sample_is_cut_short_and_is_not_a_hang(tiny: Path) -> None:
    """A million tokens used to be a hang for the watchdog, at each attempt."""
    done = command(
        "hpcgpt.train", str(tiny), "--sample.tokens", "1000000", "--sample.max_s", "3", "--watchdog.hang_min_s", "2",
        "--watchdog.hang_factor", "1",
    )  # fmt: skip
    assert done.returncode == FINISHED, done.stderr
    assert done.stdout.count("--- sample at step") == 2


@pytest.mark.processes
def test_a_signal_within_a_sample_is_handled(tiny: Path) -> None:
    with Running("hpcgpt.train", str(tiny), "--sample.tokens", "1000000", "--sample.max_s", "3600") as running:
        folder = tiny.parent / "runs" / "tiny"
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or b"val/loss" not in (folder / "metrics.jsonl").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == AGAIN, running.errors
