"""hpcgpt.requeue: what happens to the job next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import command, rows

from hpcgpt import runfolder
from hpcgpt.preempt import Stop
from hpcgpt.requeue import Decision, Job, crashes_in_a_row, decide, job_id
from hpcgpt.runfolder import AGAIN, FAILED, FINISHED, SUPERSEDED, Exit

NOBODY = None  # rank 0 could not write exit.json: killed, or its node is gone


def policy(ended: Exit | None, status: int, crashes: int = 0, most: int = 3) -> Decision:
    """What is decided at the first start of a job that Slurm leaves alone."""
    return decide(ended, status, Job("RUNNING"), 0, crashes, most)


def left(status: int, reason: str = "", saved: bool = False) -> Exit:
    return Exit("7_0", status, reason, 1200, saved)


# --- the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "status", "requeue", "crashed", "words"),
    [
        (left(FINISHED), 0, False, False, "finished"),
        (left(FINISHED), 137, False, False, "finished"),  # srun -K may lose the true status
        (left(2, "no such key"), 2, False, False, "needs a person: no such key"),
        (left(2, "no such key"), 143, False, False, "needs a person: no such key"),
        (NOBODY, 2, False, False, "needs a person"),
        (NOBODY, SUPERSEDED, False, False, "needs a person"),
        (left(AGAIN, Stop.FILE.words, saved=True), AGAIN, False, False, "STOP file"),
        (left(AGAIN, Stop.TIME_LIMIT.words, saved=True), AGAIN, True, False, "saved at step 1,200: the time limit"),
        (left(AGAIN, Stop.TERMINATED.words, saved=True), 143, True, False, "saved at step 1,200: told to terminate"),
        (left(AGAIN, Stop.INTERRUPT.words, saved=True), 0, True, False, "saved at step 1,200: interrupted"),
        (left(FAILED, "out of memory"), 1, True, True, "crash 1 since the last new checkpoint: out of memory"),
        (NOBODY, 137, True, True, "crash 1 since the last new checkpoint: the ranks left with status 137 and no word"),
        (NOBODY, 1, True, True, "status 1 and no word"),
        (NOBODY, 0, False, False, "finished"),  # every rank said so, and rank 0's disk was full
        (NOBODY, AGAIN, True, False, "saved"),
    ],
)
def test_how_an_attempt_ended_decides(
    ended: Exit | None, status: int, requeue: bool, crashed: bool, words: str
) -> None:
    decision = policy(ended, status)
    assert (decision.requeue, decision.crashed) == (requeue, crashed)
    assert words in decision.why


TOLD = left(AGAIN, Stop.TERMINATED.words, saved=True)
ENDS = [NOBODY, TOLD, left(FAILED, "x")]


@pytest.mark.parametrize("ended", ENDS)
@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_a_user_cancelled_is_never_requeued_and_did_not_crash(ended: Exit | None, state: str) -> None:
    """While its processes are being ended, a cancelled job is COMPLETING."""
    decision = decide(ended, 143, Job(state), 0, crashes_before=0, max_crashes=3)
    assert (decision.requeue, decision.crashed) == (False, False)
    assert "cancelled" in decision.why


@pytest.mark.parametrize(
    "job",
    [Job("RUNNING"), Job("COMPLETING", preempted=True), Job("COMPLETING", over_time=True), Job("PREEMPTED"),
     Job("TIMEOUT"), Job("")],
)  # fmt: skip
def test_in_any_other_state_a_saved_job_is_requeued_also_when_slurm_preempted_it(job: Job) -> None:
    assert decide(TOLD, 143, job, 0, 0, 3).requeue


@pytest.mark.parametrize(
    ("before", "allowed", "requeue"),
    [(0, 3, True), (1, 3, True), (2, 3, False), (3, 3, False), (99, 3, False), (0, 1, False), (8, 10, True)],
)
def test_the_last_of_max_crashes_in_a_row_is_a_crash_loop(before: int, allowed: int, requeue: bool) -> None:
    decision = policy(left(FAILED, "out of memory"), 1, crashes=before, most=allowed)
    assert decision.requeue == requeue
    assert decision.crashed
    assert "out of memory" in decision.why
    assert ("crash loop" in decision.why) != requeue


def test_earlier_crashes_do_not_keep_a_saved_job_from_being_requeued() -> None:
    assert policy(left(AGAIN, Stop.TIME_LIMIT.words, saved=True), AGAIN, crashes=99).requeue


@pytest.mark.parametrize("ended", ENDS)
@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_job_that_slurm_has_requeued_by_itself_is_left_alone_and_did_not_crash(
    ended: Exit | None, state: str
) -> None:
    """It may even run again already; a second requeue would hit the new start."""
    decision = decide(ended, 143, Job(state, restarts=2), 1, crashes_before=0, max_crashes=3)
    assert (decision.requeue, decision.crashed) == (False, False)
    assert decide(TOLD, 143, Job("RUNNING", restarts=2), 2, 0, 3).requeue


def saved(step: int) -> dict[str, Any]:
    return {"event": "save", "step": step}


CRASH, START = {"event": "crash"}, {"event": "start"}


@pytest.mark.parametrize(
    ("events", "crashes"),
    [
        ([], 0),
        ([START, saved(4)], 0),
        ([START, CRASH, START, CRASH], 2),
        ([CRASH, saved(4)], 0),
        ([CRASH, saved(4), CRASH], 1),
        # Going back to step 2 and saving step 4 once more is no progress.
        ([saved(4), CRASH, saved(4), CRASH, saved(4), CRASH], 3),
        ([saved(8), CRASH, saved(4), CRASH], 2),
        ([saved(4), CRASH, saved(8), CRASH, saved(12), CRASH], 1),
        ([CRASH, {"event": "requeue"}, {"event": "signal"}, CRASH], 2),
    ],
)
def test_crashes_count_since_the_last_checkpoint_of_a_step_that_had_none(
    events: list[dict[str, Any]], crashes: int
) -> None:
    assert crashes_in_a_row(events) == crashes


@pytest.mark.parametrize(
    ("env", "job"),
    [
        ({"SLURM_JOB_ID": "7"}, "7"),
        ({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}, "7_2"),
        # The plain id of one task of an array is the id of the whole array.
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}, "7_0"),
    ],
)
def test_an_array_task_requeues_itself_and_not_the_array(env: dict[str, str], job: str) -> None:
    assert job_id(env) == job


# --- as the batch script runs it -------------------------------------------------------------------


def test_folder_makes_the_run_folder_and_prints_it_and_nothing_else(tmp_path: Path) -> None:
    done = command("hpcgpt.requeue", "folder", "quickstart", "--run.dir", str(tmp_path), "--run.name", "a b")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a b\n"), done.stderr
    assert (tmp_path / "a b" / "logs").is_dir()
    before = (tmp_path / "a b" / "run.json").read_bytes()
    command("hpcgpt.requeue", "folder", "quickstart", "--run.dir", str(tmp_path), "--run.name", "a b")
    assert (tmp_path / "a b" / "run.json").read_bytes() == before


def test_folder_with_a_wrong_configuration_makes_nothing(tmp_path: Path) -> None:
    done = command("hpcgpt.requeue", "folder", "--run.dir", str(tmp_path / "runs"), "--model.n_layers=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean --model.n_layer?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [[], ["quickstart"], ["--status", "0"], ["decide"], ["decide", "quickstart"], ["decide", "--status"],
     ["decide", "--status", "x", "quickstart"], ["decide", "--status", "-1"]],
)  # fmt: skip
def test_wrong_usage_ends_with_status_2_and_a_sentence(words: list[str]) -> None:
    done = command("hpcgpt.requeue", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(("error: usage:", "error: requeue decide needs --status N first"))


class FakeSlurm:
    """An scontrol that keeps what it is told. The real one is asked in tests/test_lab.py and its neighbours."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.said = folder / "scontrol.txt"
        self.answers()

    def answers(self, state: str = "RUNNING", restarts: int = 0, refuses: bool = False, **fields: str) -> None:
        more = {"Reason": "None", "PreemptTime": "None"} | fields
        said = " ".join(f"{key}={value}" for key, value in more.items())
        script = self.folder / "scontrol"
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {self.said}\n'
            f'if [ "$1" = requeue ]; then {"echo Invalid >&2; exit 1" if refuses else "exit 0"}; fi\n'
            f"echo 'JobId=7 JobName=x JobState={state} {said} Requeue=1 Restarts={restarts} BatchFlag=1'\n"
        )
        script.chmod(0o755)

    @property
    def requeued(self) -> list[str]:
        lines = self.said.read_text().splitlines() if self.said.exists() else []
        return [line.removeprefix("requeue ") for line in lines if line.startswith("requeue")]


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


def decided(slurm: FakeSlurm, run: Path, status: int, **env: str) -> tuple[int, str]:
    """Let `requeue decide` act on the run in that folder; its exit status and what it said."""
    job = {"SLURM_JOB_ID": "7", "PATH": f"{slurm.folder}:/usr/bin:/bin"} | env
    done = command("hpcgpt.requeue", "decide", "--status", str(status), "--run.dir", str(run.parent), "--run.name",
                   run.name, env=job)  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    runfolder.prepare(folder)
    return folder


def test_a_saved_attempt_is_requeued(slurm: FakeSlurm, run: Path) -> None:
    runfolder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.words, saved=True))
    status, said = decided(slurm, run, 143)
    assert status == 0
    assert "requeue of job 7: saved at step 1,200" in said
    assert slurm.requeued == ["7"]
    assert [event["event"] for event in runfolder.events(run)] == ["requeue"]


def test_a_finished_attempt_is_left_alone(slurm: FakeSlurm, run: Path) -> None:
    runfolder.write_exit(run, left(FINISHED))
    status, said = decided(slurm, run, 0)
    assert status == 0
    assert "no requeue of job 7: training is finished" in said
    assert slurm.requeued == []


def test_a_cancelled_job_is_left_alone(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(state="COMPLETING")
    runfolder.write_exit(run, left(AGAIN, Stop.TERMINATED.words, saved=True))
    assert "no requeue of job 7" in decided(slurm, run, 143)[1]
    assert slurm.requeued == []


@pytest.mark.parametrize("fields", [{"PreemptTime": "2026-01-02T03:04:05"}, {"Reason": "TimeLimit"}])
def test_a_job_that_slurm_ended_for_another_reason_is_requeued(
    fields: dict[str, str], slurm: FakeSlurm, run: Path
) -> None:
    slurm.answers(state="COMPLETING", **fields)
    runfolder.write_exit(run, TOLD)
    assert "requeue of job 7: saved at step 1,200" in decided(slurm, run, 143)[1]
    assert slurm.requeued == ["7"]


def test_what_an_earlier_attempt_left_behind_says_nothing_about_this_one(slurm: FakeSlurm, run: Path) -> None:
    """The second start was killed without a word; the exit.json in the folder is the first one's."""
    runfolder.write_exit(run, left(FINISHED))
    _, said = decided(slurm, run, 137, SLURM_RESTART_COUNT="1")
    assert "crash 1" in said
    assert slurm.requeued == ["7"]


def test_three_crashes_without_a_checkpoint_are_the_end_and_a_checkpoint_between_starts_anew(
    slurm: FakeSlurm, run: Path
) -> None:
    for _ in range(2):
        decided(slurm, run, 137)
    runfolder.record(run, "save", step=10)
    said = [decided(slurm, run, 137)[1] for _ in range(3)]
    assert ["crash loop" in text for text in said] == [False, False, True]
    assert len(slurm.requeued) == 4
    assert [row["event"] for row in rows(run / "events.jsonl")].count("crash") == 5


def test_a_requeue_that_slurm_refuses_ends_with_what_to_do(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(refuses=True)
    runfolder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.words, saved=True))
    status, said = decided(slurm, run, AGAIN)
    assert status == 1
    assert "Slurm refused to requeue job 7: Invalid. Submit the same command again" in said


def test_a_job_that_slurm_has_requeued_already_is_not_requeued_twice(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(state="PENDING", restarts=1)
    runfolder.write_exit(run, left(AGAIN, Stop.TERMINATED.words, saved=True))
    status, said = decided(slurm, run, AGAIN)
    assert status == 0
    assert "Slurm has requeued it already" in said
    assert slurm.requeued == []


def test_a_damaged_exit_json_is_a_crash_and_no_end(slurm: FakeSlurm, run: Path) -> None:
    (run / "exit.json").write_text(json.dumps({"status": 0}))
    assert "crash 1" in decided(slurm, run, 137)[1]


def test_without_scontrol_it_says_so_in_a_sentence(slurm: FakeSlurm, run: Path) -> None:
    (slurm.folder / "scontrol").unlink()
    runfolder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.words, saved=True))
    status, said = decided(slurm, run, AGAIN, PATH=str(slurm.folder))
    assert status == 1
    assert "scontrol" in said
