"""hpcgpt.status.watch, .view and .screen: the live view in a real pty, and lines without a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.run import run_folder as run_folder_module
from hpcgpt.slurm.queue import Presence
from hpcgpt.status import run_status, view
from hpcgpt.status.view import Snapshot
from hpcgpt.status.watch import Over, Repeated, Watched
from tests.programs import ROOT, clean_env
from tests.status.made_runs import NOW, answering, run_folder
from tests.status.pty_terminal import PtyTerminal, Reader

START = {"attempt": 1, "job": "7_0", "step": 0, "total_steps": 900, "world_size": 4, "hosts": ["n1", "n1", "n2", "n2"]}
FINISHED = {"attempt": 1, "status": 0, "reason": "finished", "step": 900}
SAVED = {"attempt": 1, "status": 75, "reason": "told to terminate", "step": 3}
CRASH = {"job": "7_0", "status": 137, "reason": "crash 1: rank 3 was killed"}


def with_squeue(tmp_path: Path, script: str) -> str:
    """Make a stand-in for squeue of these lines of shell; return a PATH that begins with it."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f"#!/bin/sh\n{script}\n")
    squeue.chmod(0o755)
    return f"{squeue.parent}:{os.environ['PATH']}"


def live_run(tmp_path: Path, steps: int = 150, name: str = "run", total: int = 900) -> Path:
    """Make a run whose last step is now."""
    folder = run_folder(tmp_path, held=True, name=name)
    (folder / "events.jsonl").unlink()
    now = time.time()
    start = START | {"total_steps": total, "event": "start", "time": now - steps - 1}
    (folder / "events.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "metrics.jsonl").unlink()
    add_steps(folder, 1, steps + 1, now - steps)
    return folder


def add_steps(folder: Path, first: int, end: int, began_at: float) -> None:
    figures = {"attempt": 1, "train/step_s": 1.0, "train/tokens_per_s": 1_250_000.0}
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(first, end):
            row = {"step": step, "time": began_at + step - first + 1, "tokens": 8 * step, "train/loss": 2 + 8 / step}
            print(json.dumps(row | figures), file=file)


def watch(
    *arguments: str, columns: int = 80, rows: int = 24, cwd: Path = ROOT, env: dict[str, str] | None = None,
    shell: str = "",
) -> PtyTerminal:  # fmt: skip
    command = [sys.executable, "-m", "hpcgpt.status", "--watch", "0.2", *arguments]
    if shell:
        command = ["bash", "-c", shell, "bash", *command]
    environment = clean_env() | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)} | (env or {})
    return PtyTerminal(command, environment, cwd, columns, rows)


# --- in a terminal ---------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_view_of_a_run_is_drawn_in_place_follows_it_and_restores_the_terminal(tmp_path: Path) -> None:
    folder = live_run(tmp_path)
    with watch(str(folder)) as terminal:
        lines = terminal.wait_for_text("goodput ")
        assert (terminal.screen.second, terminal.screen.cursor) == (True, False)
        assert "/run  running" in lines[0]
        assert lines[0].endswith("q: quit, z: zoom")
        text = "\n".join(lines)
        assert re.search(r"goodput \d", text)
        for part in ("step 150 of 900  [###", "16.7%, 12m30s left", "loss 2.0533, 1.25M tokens/s, 1 s a step",
                     "attempt 1, 4 ranks on n[1-2]", "step 150"):  # fmt: skip
            assert part in text
        assert any("⠀" < letter <= "⣿" for letter in text)  # braille

        add_steps(folder, 151, 301, time.time() - 150)
        lines = terminal.wait_for_text("step 300 of 900")
        terminal.wait_for(lambda lines: lines[23].endswith("step 300"))

        # What is cut off is read again.
        os.truncate(folder / "metrics.jsonl", 10_000)
        terminal.wait_for(lambda lines: "step 300" not in "".join(lines) and "│" in "".join(lines))

        terminal.press("z")
        zoomed = terminal.wait_for_text("z: whole curve")
        assert zoomed[-1].split()[0] != "1"
        terminal.press("z")
        terminal.wait_for(lambda lines: lines[-1].split()[0] == "1")

        terminal.resize(60, 12)
        lines = terminal.wait_for(lambda lines: "q: quit" in lines[0] and "step" in lines[-1])
        assert max(map(len, lines)) <= 60
        terminal.resize(100, 40)
        terminal.wait_for(lambda lines: "q: quit" in lines[0] and "step" in lines[-1])

        terminal.press("q")
        assert terminal.wait_for_end() == 0
        assert (terminal.screen.second, terminal.screen.cursor, terminal.screen.wrap) == (False, True, True)
        assert terminal.mode == terminal.mode_before


@pytest.mark.processes
@pytest.mark.parametrize(("ending", "status"), [("\x03", 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ctrl_c_and_signals_restore_the_terminal(tmp_path: Path, ending: str | signal.Signals, status: int) -> None:
    with watch(str(live_run(tmp_path))) as terminal:
        terminal.wait_for_text("step 150 of 900")
        assert terminal.mode != terminal.mode_before
        if isinstance(ending, str):
            terminal.press(ending)
        else:
            terminal.process.send_signal(ending)
        assert terminal.wait_for_end() == status
        assert (terminal.screen.second, terminal.screen.cursor) == (False, True)
        assert terminal.mode == terminal.mode_before
        assert b"Traceback" not in terminal.raw


@pytest.mark.processes
def test_ctrl_z_gives_the_terminal_back_until_the_program_continues(tmp_path: Path) -> None:
    """Under a shell with job control: a program without one is not stopped by Ctrl-Z."""
    with watch(str(live_run(tmp_path)), shell='set -m; "$@"; echo "[stopped]"; read -r; fg') as terminal:
        terminal.wait_for_text("step 150 of 900")
        terminal.press("\x1a")
        terminal.wait_for(lambda _lines: b"[stopped]" in terminal.raw)
        assert (terminal.screen.second, terminal.screen.cursor) == (False, True)
        assert terminal.mode == terminal.mode_before
        terminal.press("\n")
        terminal.wait_for(lambda lines: terminal.screen.second and "step 150 of 900" in "".join(lines))
        terminal.press("q")
        assert terminal.wait_for_end() == 0


@pytest.mark.processes
def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    folder = live_run(tmp_path)
    with watch(str(folder)) as terminal:
        terminal.wait_for_text("step 150 of 900")
        shutil.move(folder, tmp_path / "elsewhere")
        lines = terminal.wait_for_text("not readable now, this is what was read before")
        assert any("step 150 of 900" in line for line in lines)
        shutil.move(tmp_path / "elsewhere", folder)
        terminal.wait_for(lambda lines: "not readable" not in "".join(lines))
        terminal.press("q")
        assert terminal.wait_for_end() == 0


@pytest.mark.processes
def test_a_slurm_that_hangs_neither_stops_the_view_nor_the_keys_and_is_asked_once(tmp_path: Path) -> None:
    path = with_squeue(tmp_path, f"echo asked >> {tmp_path}/asked\nexec sleep 100")
    folder = live_run(tmp_path)
    with watch(str(folder), env={"PATH": path}) as terminal:
        terminal.wait_for_text("step 150 of 900")
        for step in range(151, 161):
            add_steps(folder, step, step + 1, time.time() - 1)
            terminal.wait_for_text(f"step {step} of 900")
        assert (tmp_path / "asked").read_text() == "asked\n"
        terminal.press("q")
        assert terminal.wait_for_end() == 0


@pytest.mark.processes
def test_several_runs_are_a_table_and_new_ones_appear(tmp_path: Path) -> None:
    live_run(tmp_path / "runs", name="first")
    with watch(cwd=tmp_path, env={"NO_COLOR": "1"}) as terminal:
        terminal.wait_for_text("step 150 of 900")  # a single one
        live_run(tmp_path / "runs", name="second", steps=30)
        lines = terminal.wait_for_text("second")
        assert lines[0].split() == ["RUN", "STATE", "STEP/TOTAL", "LOSS", "TOK/S", "LEFT", "CHANGED"]
        assert b"\x1b[1m" not in terminal.raw
        terminal.press("q")
        assert terminal.wait_for_end() == 0


@pytest.mark.processes
def test_an_encoding_without_braille_gets_ascii(tmp_path: Path) -> None:
    with watch(str(live_run(tmp_path)), env={"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}) as terminal:
        lines = terminal.wait_for_text("step 150 of 900")
        lines = terminal.wait_for(lambda lines: "*" in "".join(lines))
        assert "".join(lines).isascii()
        terminal.press("q")
        assert terminal.wait_for_end() == 0


# --- without a terminal ----------------------------------------------------------------------------


@pytest.mark.processes
def test_without_a_terminal_a_line_is_printed_for_each_change_until_the_run_is_over(tmp_path: Path) -> None:
    folder = live_run(tmp_path)
    command = [sys.executable, "-m", "hpcgpt.status", "--watch", "0.1", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as running:  # fmt: skip
        assert running.stdout
        assert running.stderr
        first = running.stdout.readline()
        assert first.endswith(f"{folder}: running, step 150/900, loss 2.0533, 1,250,000 tokens/s, 12.5 min left\n")
        add_steps(folder, 151, 152, time.time() - 1)
        assert "step 151/900" in running.stdout.readline()
        run_folder_module.record(folder, "end", **FINISHED)
        assert running.stdout.readline().endswith(
            f"{folder}: finished, step 151/900, loss 2.0530, 1,250,000 tokens/s\n"
        )
        assert running.wait(30) == 0
        assert (running.stdout.read(), running.stderr.read()) == ("", "")


@pytest.mark.processes
def test_a_line_is_not_repeated_where_only_slurms_estimate_of_the_start_has_changed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, held=False)
    run_folder_module.record(folder, "submit", job="7")
    asked = tmp_path / "asked"
    start = f"$(date +%s)$(wc -l < {asked})"  # another one each time
    path = with_squeue(tmp_path, f'echo >> {asked}\necho "7|PENDING|{start}|N/A||Priority"')
    code = (
        "import sys; from pathlib import Path; from hpcgpt.slurm import queue; queue.EVERY_S = 0.1\n"
        "from hpcgpt.status import watch; watch.watch(lambda: [Path(sys.argv[1])], 0.2, '')"
    )
    env = clean_env() | {"PATH": path}
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                          text=True) as running:  # fmt: skip
        deadline = time.monotonic() + 60
        while not asked.exists() or asked.stat().st_size < 4:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (folder / "STOP").touch()
        assert running.stdout
        lines = running.stdout.read().splitlines()
    shown = [line.partition(": ")[2].partition(",")[0] for line in lines]
    assert shown == ["pending", "stopped (a STOP file keeps it stopped)"]


@pytest.mark.processes
def test_a_run_that_is_requeued_is_followed_until_it_has_finished(tmp_path: Path) -> None:
    """From its end until the batch script has requeued its job, it is `saved`, and Slurm still has the job."""
    folder = live_run(tmp_path, steps=9)
    events = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text('{"event": "job", "job": "7_0", "time": 1.0}\n' + events)
    answer = tmp_path / "answer"
    path = with_squeue(tmp_path, f"cat {answer}")
    answer.write_text("7|RUNNING|1|2|n1|None\n")
    code = (
        "import sys; from pathlib import Path; from hpcgpt.slurm import queue; from hpcgpt.status import watch\n"
        "queue.EVERY_S, watch.GONE_S = 0.1, 0.5; watch.watch(lambda: [Path(sys.argv[1])], 0.1, '')"
    )
    env = clean_env() | {"PATH": path}
    with subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                          text=True) as running:  # fmt: skip
        assert running.stdout
        event: str
        fields: dict[str, Any]
        for state, event, fields in (
            ("running", "end", SAVED),
            ("saved (told to terminate)", "requeue", {"job": "7_0"}),
            ("requeued", "job", {"job": "7_1"}),
            ("starting", "start", START | {"attempt": 2, "job": "7_1"}),
            ("running", "crash", {"job": "7_1", "reason": "crash 1", "status": 1}),
            ("failed (crash 1)", "requeue", {"job": "7_1"}),
            ("requeued", "start", START | {"attempt": 3, "job": "7_2"}),
            ("running", "crash", {"job": "7_2", "reason": "crash loop", "status": 1}),
            ("failed (crash loop)", "", {}),
        ):
            assert running.stdout.readline().partition(": ")[2].startswith(f"{state}, "), state
            time.sleep(1.0)  # several readings
            assert running.poll() is None, state
            if event:
                run_folder_module.record(folder, event, **fields)
        answer.write_text("")
        assert running.wait(30) == 0
        assert running.stdout.read() == ""


@pytest.mark.parametrize(
    ("event", "presence", "over_after_s"),
    [
        (("end", SAVED), "there", None),
        (("end", SAVED), "pending", None),
        (("end", SAVED), "gone", 60),
        (("end", SAVED), "unknown", 300),
        (("crash", CRASH), "there", None),
        (("crash", CRASH), "gone", 60),
        (("end", FINISHED), "there", 0),
        (("no_requeue", {"job": "7_0", "attempt": 1, "reason": "the job was cancelled"}), "there", 0),
    ],
)
def test_a_run_that_has_ended_is_over_when_its_job_is_not_started_again(
    tmp_path: Path, event: tuple[str, dict[str, Any]], presence: Presence, over_after_s: float | None
) -> None:
    folder = run_folder(tmp_path, (10, "job", {"job": "7_0"}), (9, "start", START), (5, *event), steps=3)
    queue = answering(presence)
    run, over = run_status.brief(folder, NOW, queue), Over(queue)
    readings = [after_s for after_s in range(0, 3600, 30) if over.all([run], 1000.0 + after_s)]
    assert readings[:1] == ([] if over_after_s is None else [over_after_s])


def test_an_allocation_in_which_a_run_was_started_by_hand_does_not_continue_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (9, "start", START), (5, "end", SAVED), steps=3)
    queue = answering("there")
    assert Over(queue).all([run_status.brief(folder, NOW, queue)], 0)


def test_a_task_of_a_grid_that_was_submitted_may_continue_a_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (9, "start", START), (8, "end", SAVED), (5, "submit", {"job": "12_3"}), steps=3)
    queue = answering("unknown")
    run = run_status.brief(folder, NOW, queue)
    over = Over(queue)
    assert not over.all([run | {"state": "saved"}], 0)
    assert over.all([run | {"state": "saved"}], 300)


def test_only_what_stays_as_it_was_is_over(tmp_path: Path) -> None:
    """Another attempt that fails, or a folder that can be read again, counts anew."""
    folder = run_folder(tmp_path, (10, "job", {"job": "7_0"}), (9, "start", START), (5, "crash", CRASH), steps=3)
    queue = answering("gone")
    run, over = run_status.brief(folder, NOW, queue), Over(queue)
    unreadable = {"run": str(folder), "state": "unreadable", "reason": "Stale file handle"}
    assert not over.all([run], 0)
    assert not over.all([run | {"attempts": 2}], 60)
    assert not over.all([unreadable], 90)
    assert not over.all([run | {"state": "running"}], 140)
    assert not over.all([unreadable], 150)
    assert over.all([unreadable], 210)
    assert not over.all([run, unreadable], 211)  # both are looked at


def test_without_slurm_a_run_that_has_ended_is_over_at_once(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, (9, "start", START | {"job": ""}), (5, "end", SAVED), steps=3, held=False)
    queue = answering("unknown")
    run = run_status.brief(folder, NOW, queue)
    assert run["state"] == "saved"
    assert Over(queue).all([run], 0)


@pytest.mark.processes
def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    folder = live_run(tmp_path)
    run_folder_module.record(folder, "end", **FINISHED)
    with watch(str(folder), env={"TERM": "dumb"}, columns=200) as terminal:
        assert terminal.wait_for_end() == 0
        assert b"finished, step 150/900" in terminal.raw
        assert b"\x1b" not in terminal.raw


# --- the view, without a terminal ------------------------------------------------------------------


def snapshot(tmp_path: Path, *events: tuple[float, str, dict[str, Any]], presence: Any = "unknown") -> Snapshot:
    folder = run_folder(tmp_path, *events, steps=9, held=True)
    run = run_status.brief(folder, NOW, answering(presence))
    return Snapshot(NOW, [run], [(step, 10 / step) for step in range(1, 10)])


def texts(shown: Sequence[tuple[str, str]]) -> str:
    return "\n".join(text for text, _ in shown)


def test_every_state_fits_every_size(tmp_path: Path) -> None:
    crash = {"job": "7_0", "reason": "crash 1: \x1b[31mrank 3 was killed", "status": 1}
    histories: dict[str, tuple[Any, list[Any]]] = {
        "running": ("there", [(900, "start", START)]),
        "requeued": ("pending", [(900, "start", START), (2, "crash", crash), (1, "requeue", {"job": "7_0"})]),
        "held": ("held", [(900, "start", START), (2, "crash", crash), (1, "requeue", {"job": "7_0"})]),
        "failed": ("unknown", [(900, "start", START), (2, "crash", crash)]),
    }
    for state, (presence, events) in histories.items():
        shown = snapshot(tmp_path / state, *events, presence=presence)
        assert shown.runs[0]["state"] == state
        for columns, rows in ((80, 24), (40, 12), (20, 5), (1, 1), (300, 100)):
            lines = view.lines(shown, columns, rows, "braille")
            assert len(lines) <= rows
            assert all(len(text) <= columns and text.isprintable() for text, _ in lines)
            assert columns < 20 or state in lines[0][0]  # the path is longer than that
    waiting = texts(view.lines(shown := snapshot(tmp_path / "x", *histories["requeued"][1], presence="pending"), 80, 24,
                               "ascii"))  # fmt: skip
    assert "job 7 waits (Priority): jobs with a higher priority are ahead of it" in waiting
    narrow = texts(view.lines(shown, 40, 24, "ascii"))
    assert "job 7 waits (Priority): jobs with a\nhigher priority are ahead of it\n" in narrow
    assert r"\x1b[31mrank 3" in waiting
    assert shown.runs[0]["job"]["waiting_helps"] is True


def test_what_could_not_be_read_is_said_above_what_was_read_before(tmp_path: Path) -> None:
    shown = snapshot(tmp_path, (900, "start", START))
    broken = Snapshot(NOW, shown.runs, shown.points, None, "Stale file handle", "did not answer")
    text = texts(view.lines(broken, 100, 24, "ascii"))
    assert "not readable now, this is what was read before: Stale file handle" in text
    assert "Slurm does not answer: did not answer" in text
    assert "step 9 of 900" in text
    nothing = texts(view.lines(Snapshot(NOW, problem="no runs below runs"), 80, 24, "ascii"))
    assert nothing.startswith("no runs (yet)\n\nno runs below runs\n")


def test_reading_keeps_the_last_snapshot_of_a_folder_that_vanished(tmp_path: Path) -> None:
    folder = live_run(tmp_path)
    watched = Watched(lambda: [folder])
    assert watched.read().runs[0]["step"] == 150
    watched.measure_goodput()
    assert watched.goodput
    shutil.rmtree(folder)
    after = watched.read()
    assert (after.runs[0]["step"], after.goodput) == (150, watched.goodput)
    assert "run.json" in after.problem


def test_the_curve_of_a_run_that_went_back_ends_there(tmp_path: Path) -> None:
    """metrics.jsonl has the later steps until an attempt continues."""
    folder = run_folder(tmp_path, (300, "start", {"attempt": 1}), steps=150, held=False)
    watched = Watched(lambda: [folder])
    assert watched.read().points[-1][0] == 150
    run_folder_module.record(folder, "went_back", attempt=2, step=100, from_step=150, aside="x")
    assert watched.read().points[-1][0] == 100


def test_an_error_in_a_thread_is_kept_and_the_next_call_may_succeed() -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("first")
        return len(calls)

    repeated = Repeated(work, 0.01)
    deadline = time.monotonic() + 20
    while repeated.result is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    repeated.stop()
    assert repeated.error is None


def test_the_reader_of_the_tests_fails_on_sequences_that_are_not_documented() -> None:
    reader = Reader(10, 2)
    reader.feed("\x1b[2;3Habc\x1b[1mé\x1b[0m".encode()[:14])
    reader.feed("\x1b[2;3Habc\x1b[1mé\x1b[0m".encode()[14:])
    assert reader.lines == ["", "  abcé"]
    with pytest.raises(AssertionError, match="unknown sequence"):
        reader.feed(b"\x1b[3C")
    with pytest.raises(AssertionError, match="longer than the screen"):
        Reader(3, 1).feed(b"abcd")
