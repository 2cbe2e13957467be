"""hpcgpt.run.crash_report: which rank failed first, on which host, and how."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcgpt.distributed.world import World
from hpcgpt.run import crash_report
from hpcgpt.run.crash_report import Fault, FirstFailure, TaskExit, first_failure, task_exits
from tests.programs import command, torchrun

# The output of srun 22.05, in the lab.
KILLED = """\
srun: error: n2: task 3: Killed
srun: launch/slurm: _step_signal: Terminating StepId=4.0
srun: error: n2: task 2: Killed
srun: error: n1: tasks 0-1: Killed
srun: Force Terminated StepId=4.0
"""
NODE = """\
srun: error: Node failure on n2
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n1: task 0: Terminated
"""
REQUEUED = """\
slurmstepd-n1: error: *** JOB 14 ON n1 CANCELLED AT 2026-11-24T15:14:54 DUE TO JOB REQUEUE ***
srun: got SIGCONT
srun: forcing job termination
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n1: task 0: Terminated
"""
LOST_FIRST = "srun: error: n1: tasks 0-1: Exited with exit code 1\n" + KILLED


def fault(rank: int, kind: str = "error", status: int = 1, at: float = 10.0) -> Fault:
    return Fault(rank, f"h{rank}", 1, status, f"message of {rank}", ["a", "b"], at, None, kind)  # type: ignore[arg-type]


def test_srun_messages_about_tasks_and_nodes_are_parsed() -> None:
    assert task_exits(KILLED) == [
        TaskExit("n2", (3,), "Killed", False),
        TaskExit("n2", (2,), "Killed", True),
        TaskExit("n1", (0, 1), "Killed", True),
    ]
    assert task_exits(NODE)[0] == TaskExit("n2", (), "node failed", False)
    many = task_exits(
        "srun: error: gpu-07: tasks 8-10,15: Exited with exit code 76\nsrun: error: n1: task 0: Out Of Memory"
    )
    assert [(end.host, end.ranks, end.status, end.how) for end in many] == [
        ("gpu-07", (8, 9, 10, 15), 76, "Exited with exit code 76"), ("n1", (0,), None, "Out Of Memory"),
    ]  # fmt: skip
    other = "srun: error: Unable to create step for job 7: Requested nodes are busy\n\x00\xff: task x: y"
    assert task_exits(other) == []


@pytest.mark.parametrize(
    ("srun_output", "faults", "expected"),
    [
        (KILLED, [], "rank 3 on n2: Killed"),
        # With gloo the other ranks notice within milliseconds, and end before Slurm reports the one that was killed.
        (LOST_FIRST, [fault(0, "lost"), fault(1, "lost")], "rank 3 on n2: Killed"),
        (LOST_FIRST, [], "rank 0 on n1: Exited with exit code 1"),
        (NODE, [fault(0, "lost")], "n2: node failed"),
        ("srun: error: n2: task 3: Exited with exit code 1", [fault(3)], "rank 3 on h3: exit status 1: message of 3"),
        (LOST_FIRST, [fault(0, "lost"), fault(1, "lost"), fault(3, at=9)], "rank 3 on h3: exit status 1: message of 3"),
        # No rank's fault: Slurm ended all of them.
        (REQUEUED, [], None),
        (REQUEUED, [fault(0, "lost")], None),
        ("", [fault(2, at=11.0), fault(1, "lost", at=5.0), fault(3, at=10.5)],
         "rank 3 on h3: exit status 1: message of 3"),
        ("", [fault(1, "hang", at=3.0), fault(0, "lost")], "rank 1 on h1: hung: message of 1"),
        ("", [], None),
        # The watchdog ended the rank before srun reported it.
        (KILLED.replace("task 3: Killed", "task 3: Exited with exit code 1"), [fault(3, "hang")],
         "rank 3 on h3: hung: message of 3"),
    ],
)  # fmt: skip
def test_the_first_failure_is_found_not_its_consequences(
    srun_output: str, faults: list[Fault], expected: str | None
) -> None:
    found = first_failure(task_exits(srun_output), faults)
    assert (str(found) if found else None) == expected


def test_errors_of_ranks_are_written_and_read_back_in_order(tmp_path: Path) -> None:
    def here(rank: int) -> World:
        return World(rank, rank, 4, 4, "alone", "mine")

    for rank in (3, 1):
        try:
            raise RuntimeError(f"boom\n  {rank}")
        except RuntimeError as error:
            crash_report.write(tmp_path, here(rank), error, 1, step=7)
    crash_report.write(tmp_path, here(2), ConnectionError("lost it"), 1)
    folder = tmp_path / "faults" / "mine"
    (folder / "rank_00005.json").write_text('{"rank": 5, "ho')
    (folder / "rank_00006.json").write_text("[]")
    (folder / "rank_00007.json").write_bytes(b"\xff\x00")
    (folder / "rank_00008.json").write_text(json.dumps({"rank": "x"}))
    found = crash_report.read(tmp_path, "mine")
    assert [(one.rank, one.kind, one.status, one.step, one.reason) for one in found] == [
        (3, "error", 1, 7, "boom 3"), (1, "error", 1, 7, "boom 1"), (2, "lost", 1, None, "lost it"),
    ]  # fmt: skip
    assert found[0].trace[0].startswith("Traceback")
    assert found[0].trace[-2].startswith("RuntimeError: boom")
    assert crash_report.read(tmp_path, "another") == []


def test_where_nothing_can_be_written_there_is_a_warning_and_no_exception(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faults").write_text("a file where a folder belongs")
    crash_report.write(tmp_path, World(0, 0, 1, 1, "alone", "mine"), RuntimeError("boom"), 1)
    assert "report" in crash_report.report(tmp_path, "mine", None, [])
    assert capsys.readouterr().err.count("warning: ") == 2


def test_the_report_contains_first_failure_log_stacks_and_exits(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "7_0.log").write_text("\n".join(f"line {n}" for n in range(100)))
    text = crash_report.report(tmp_path, "7_0", FirstFailure(3, "n2", "Killed", None), task_exits(KILLED))
    assert "first to fail: rank 3 on n2: Killed" in text
    assert "line 99" in text
    assert "line 84" not in text
    assert "n2 rank 3: Killed; n2 rank 2: Killed; n1 ranks 0, 1: Killed" in text
    assert (tmp_path / "faults" / "7_0" / "report.txt").read_text() == text + "\n"
    reported = FirstFailure(3, "n2", "exit status 1", 1, "boom", ("Traceback", "RuntimeError: boom"))
    (tmp_path / "faults" / "7_0" / "rank_00003.stacks.txt").write_text("stack")
    text = crash_report.report(tmp_path, "7_0", reported, [])
    assert "    RuntimeError: boom" in text
    assert "line 99" not in text
    assert "rank_00003.stacks.txt" in text


@pytest.mark.processes
def test_a_process_that_ends_with_an_error_leaves_its_traceback(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    assert command("hpcgpt.requeue", "folder", str(tiny)).returncode == 0
    (folder / "generations").write_text("a file where a folder belongs")
    done = torchrun(2, "hpcgpt.train", str(tiny))
    assert done.returncode != 0
    (attempt,) = (folder / "faults").iterdir()
    found = crash_report.read(folder, attempt.name)
    assert {one.rank for one in found} == {0, 1}
    assert "generations" in found[0].reason
    assert any("attempt.py" in line for line in found[0].trace)


@pytest.mark.processes
def test_a_user_error_outside_of_a_run_folder_makes_none(tiny: Path, tmp_path: Path) -> None:
    assert command("hpcgpt.train", str(tiny), "--data.dir", "nowhere").returncode == 2
    assert not (tmp_path / "runs").exists()
