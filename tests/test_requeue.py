"""hpcgpt.requeue: the decision about the job after a start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import requeue
from hpcgpt.config import operation
from hpcgpt.distributed.stop_signals import Stop
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import AGAIN, FAILED, FINISHED, SUPERSEDED
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder
from hpcgpt.run.crash_report import FirstFailure
from hpcgpt.run.run_folder import Exit
from hpcgpt.slurm import bad_nodes
from hpcgpt.slurm.bad_nodes import bad_hosts
from hpcgpt.slurm.requeue_policy import Decision, decide, decide_early
from hpcgpt.slurm.restart_history import RestartHistory, Start
from hpcgpt.slurm.scontrol import Job, job_id
from hpcgpt.storage import lease
from tests.checkpoint.small_checkpoints import save
from tests.disks import another_user, fill, small_disk
from tests.disks import shared as shared  # a fixture
from tests.fake_slurm import FakeSlurm, decided
from tests.fake_slurm import run as run  # fixtures
from tests.fake_slurm import slurm as slurm
from tests.programs import command
from tests.tiny_run import rows

NO_EXIT_FILE = None  # rank 0 could not write exit.json: it was killed, or its node failed


NEW, LIMITS = RestartHistory(), operation.Requeue(max_crashes=3, max_idle=10, max_node_failures=4)


def policy(
    ended: Exit | None, status: int, crashes: int = 0, most: int = 3, failure: FirstFailure | None = None
) -> Decision:
    """Return the decision at the first start of a job that Slurm leaves alone."""
    limits = operation.Requeue(max_crashes=most)
    return decide(ended, status, Job("RUNNING"), 0, RestartHistory(crashes), limits, failure)


def left(status: int, reason: str = "", saved: bool = False) -> Exit:
    return Exit("7_0", status, reason, 1200, saved)


# --- the policy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "status", "requeue", "crashed", "message"),
    [
        (left(FINISHED), 0, False, False, "finished"),
        (left(FINISHED), 137, False, False, "finished"),  # srun -K may lose the status
        (left(2, "no such key"), 2, False, False, "a person has to act: no such key"),
        (left(2, "no such key"), 143, False, False, "a person has to act: no such key"),
        (NO_EXIT_FILE, 2, False, False, "a person has to act"),
        (NO_EXIT_FILE, SUPERSEDED, False, False, "a person has to act"),
        (left(AGAIN, Stop.FILE.message, saved=True), AGAIN, False, False, "STOP file"),
        (left(AGAIN, Stop.TIME_LIMIT.message, saved=True), AGAIN, True, False, "saved at step 1,200: the time limit"),
        (left(AGAIN, Stop.TERMINATED.message, saved=True), 143, True, False, "saved at step 1,200: told to terminate"),
        (left(AGAIN, Stop.INTERRUPT.message, saved=True), 0, True, False, "saved at step 1,200: interrupted"),
        (left(FAILED, "out of memory"), 1, True, True, "crash 1 since the last new checkpoint: out of memory"),
        (
            NO_EXIT_FILE,
            137,
            True,
            True,
            "crash 1 since the last new checkpoint: the ranks exited with status 137 and reported no error",
        ),
        (NO_EXIT_FILE, 1, True, True, "exited with status 1 and reported no error"),
        (NO_EXIT_FILE, 0, False, False, "finished"),  # every rank exited with 0, and rank 0's disk was full
        (NO_EXIT_FILE, AGAIN, True, False, "saved"),
    ],
)
def test_the_end_of_an_attempt_decides(
    ended: Exit | None, status: int, requeue: bool, crashed: bool, message: str
) -> None:
    decision = policy(ended, status)
    assert (decision.requeue, decision.crashed) == (requeue, crashed)
    assert message in decision.reason
    assert decision.finished == (message == "finished")


@pytest.mark.parametrize(
    ("reason", "stop"),
    [("a STOP file", Stop.FILE), ("the time limit is near", Stop.TIME_LIMIT), ("interrupted", Stop.INTERRUPT),
     ("told to terminate", Stop.TERMINATED), ("out of memory", Stop.NO), ("", Stop.NO)],
)  # fmt: skip
def test_reasons_in_existing_run_folders_are_understood_as_codes(reason: str, stop: Stop) -> None:
    """These texts are in exit.json files on disk: they must be understood whatever the messages are today."""
    ended = left(AGAIN, reason, saved=True)
    assert ended.stop == stop
    assert policy(ended, AGAIN).requeue == (stop != Stop.FILE)


TERMINATED = left(AGAIN, Stop.TERMINATED.message, saved=True)


def test_a_run_that_was_saved_since_another_task_refused_to_train_is_not_requeued() -> None:
    """Two processes that each train alone in one folder: one is refused, and srun ends the other one."""
    refused = FirstFailure(0, "n2", "exit status 2", 2, "the folder is in use", ())
    decision = policy(TERMINATED, AGAIN, failure=refused)
    assert (decision.requeue, decision.crashed) == (False, False)
    assert "a person has to act" in decision.reason
    assert "the folder is in use" in decision.reason
    assert policy(TERMINATED, AGAIN, failure=FirstFailure(0, "n2", "exit status 75", AGAIN)).requeue


ENDS = [NO_EXIT_FILE, TERMINATED, left(FAILED, "x")]


@pytest.mark.parametrize("ended", ENDS)
@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING"])
def test_a_job_that_a_user_cancelled_is_never_requeued_and_did_not_crash(ended: Exit | None, state: str) -> None:
    """A cancelled job is COMPLETING while its processes are being ended."""
    decision = decide(ended, 143, Job(state), 0, NEW, LIMITS)
    assert (decision.requeue, decision.crashed) == (False, False)
    assert "cancelled" in decision.reason


@pytest.mark.parametrize(
    "job",
    [Job("RUNNING"), Job("COMPLETING", preempted=True), Job("COMPLETING", over_time=True), Job("PREEMPTED"),
     Job("TIMEOUT"), Job("COMPLETING", node_failed=True), Job("")],
)  # fmt: skip
def test_in_any_other_state_a_saved_job_is_requeued_also_when_slurm_preempted_it(job: Job) -> None:
    assert decide(TERMINATED, 143, job, 0, NEW, LIMITS).requeue


@pytest.mark.parametrize(
    ("before", "allowed", "requeue"),
    [(0, 3, True), (1, 3, True), (2, 3, False), (3, 3, False), (99, 3, False), (0, 1, False), (8, 10, True)],
)
def test_the_last_of_max_crashes_in_a_row_is_a_crash_loop(before: int, allowed: int, requeue: bool) -> None:
    decision = policy(left(FAILED, "out of memory"), 1, crashes=before, most=allowed)
    assert decision.requeue == requeue
    assert decision.crashed
    assert "out of memory" in decision.reason
    assert ("crash loop" in decision.reason) != requeue


def test_earlier_crashes_do_not_prevent_the_requeue_of_a_saved_job() -> None:
    assert policy(left(AGAIN, Stop.TIME_LIMIT.message, saved=True), AGAIN, crashes=99).requeue


@pytest.mark.parametrize("ended", ENDS)
@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_job_that_slurm_has_requeued_itself_is_left_alone_and_did_not_crash(ended: Exit | None, state: str) -> None:
    """It may even run again; a second requeue would hit the new start."""
    decision = decide(ended, 143, Job(state, restarts=2), 1, NEW, LIMITS)
    assert (decision.requeue, decision.crashed) == (False, False)
    assert decide(TERMINATED, 143, Job("RUNNING", restarts=2), 2, NEW, LIMITS).requeue


@pytest.mark.parametrize(
    ("failure", "status", "requeue", "crashed", "message"),
    [
        # Only one rank found a user error; srun -K ended the others, rank 0 too, and its status is 137.
        (FirstFailure(3, "n2", "exit status 2", 2, "no such file"), 137, False, False, "exit status 2: no such"),
        (FirstFailure(0, "n1", "Exited with exit code 76", 76), 137, False, False, "exit code 76: see the log"),
        (
            FirstFailure(3, "n2", "Killed", None),
            137,
            True,
            True,
            "crash 1 since the last new checkpoint: rank 3 on n2: Killed",
        ),
        (FirstFailure(3, "n2", "exit status 1", 1, "boom"), 137, True, True, "rank 3 on n2: exit status 1: boom"),
        # srun's own status may be that of any task: 2 is not a user error if a rank was killed first.
        (FirstFailure(3, "n2", "Killed", None), 2, True, True, "Killed"),
    ],
)
def test_without_a_report_from_rank_0_the_first_failure_decides(
    failure: FirstFailure, status: int, requeue: bool, crashed: bool, message: str
) -> None:
    decision = policy(NO_EXIT_FILE, status, failure=failure)
    assert (decision.requeue, decision.crashed) == (requeue, crashed)
    assert message in decision.reason


def test_a_node_failure_is_neither_a_crash_nor_a_cancellation() -> None:
    decision = decide(NO_EXIT_FILE, 143, Job("COMPLETING", node_failed=True), 0, RestartHistory(crashes=99), LIMITS)
    assert (decision.requeue, decision.crashed, decision.reason) == (True, False, "a node failed")


IDLE = Start("7_9", from_step=20, to_step=21, start_s=25.4, trained_s=3.2)


@pytest.mark.parametrize(("idle", "requeue"), [(0, True), (9, True), (10, False), (30, False)])
@pytest.mark.parametrize("ended", [left(AGAIN, Stop.TIME_LIMIT.message, saved=True), left(FAILED, "out of memory")])
def test_a_job_whose_starts_cost_more_than_they_gain_is_ended(ended: Exit, idle: int, requeue: bool) -> None:
    """`idle` includes the start that has just ended."""
    decision = decide(ended, AGAIN, Job("RUNNING"), 0, RestartHistory(without_progress=idle, last=IDLE), LIMITS)
    assert (decision.requeue, decision.gave_up) == (requeue, not requeue)
    assert decision.crashed == (ended.status == FAILED)
    assert ("no progress: " in decision.reason) != requeue
    assert ended.reason in decision.reason
    if idle:  # each of them is reported
        assert "took 25 s until its first step and trained for 3 s, 1 step" in decision.reason
    assert (f"{counted(idle, 'start')} in a row without progress, 10 allowed" in decision.reason) == (
        requeue and idle > 0
    )
    assert ("with a longer --time" in decision.reason) != requeue


@pytest.mark.parametrize(("before", "requeue"), [(0, True), (2, True), (3, False), (9, False)])
def test_node_failures_bring_a_job_back_a_limited_number_of_times(before: int, requeue: bool) -> None:
    job, past = Job("COMPLETING", node_failed=True), RestartHistory(node_failures=before)
    for decision in (decide(NO_EXIT_FILE, 143, job, 0, past, LIMITS), decide_early(job, 0, past, LIMITS)):
        assert decision is not None
        assert (decision.requeue, decision.crashed, decision.gave_up) == (requeue, False, not requeue)
        assert (
            requeue
            or f"{counted(before + 1, 'start')} without a new checkpoint ended with a node failure" in decision.reason
        )


ENDING = "COMPLETING"


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (Job(ENDING, node_failed=True), "a node failed"),
        (Job(ENDING, over_time=True), "at its time limit"),
        (Job(ENDING, preempted=True, fields={"Requeue": "0"}), "preempted"),
        (Job(ENDING, preempted=True, fields={"Requeue": "1"}), None),  # Slurm itself requeues it
        (Job(ENDING), None),  # the user's scancel
        (Job("RUNNING"), None),
        (Job(""), None),
        *((Job(ENDING, restarts=1, fields={"Requeue": "0"}, **{why: True}), None)
          for why in ("node_failed", "over_time", "preempted")),
    ],
    ids=str,
)  # fmt: skip
def test_decide_early_decides_only_what_slurm_will_not_do_itself(job: Job, why: str | None) -> None:
    decision = decide_early(job, 0, NEW, LIMITS)
    assert (decision is None) == (why is None)
    if decision:
        assert (decision.requeue, decision.crashed) == (True, False)
        assert why is not None
        assert why in decision.reason


def test_a_job_that_hangs_until_its_time_limit_each_time_is_ended() -> None:
    decision = decide_early(Job(ENDING, over_time=True), 0, RestartHistory(without_progress=10, last=IDLE), LIMITS)
    assert decision is not None
    assert not decision.requeue
    assert "no progress: " in decision.reason


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


# --- the command, as in the batch script -----------------------------------------------------------


@pytest.mark.processes
def test_folder_makes_the_run_folder_and_prints_only_its_path(tmp_path: Path) -> None:
    done = command("hpcgpt.requeue", "folder", "quickstart", "--run.dir", str(tmp_path), "--run.name", "a b")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/a b\n"), done.stderr
    assert (tmp_path / "a b" / "logs").is_dir()
    before = (tmp_path / "a b" / "run.json").read_bytes()
    command("hpcgpt.requeue", "folder", "quickstart", "--run.dir", str(tmp_path), "--run.name", "a b")
    assert (tmp_path / "a b" / "run.json").read_bytes() == before


@pytest.mark.processes
def test_folder_with_a_wrong_configuration_makes_nothing(tmp_path: Path) -> None:
    done = command("hpcgpt.requeue", "folder", "--run.dir", str(tmp_path / "runs"), "--model.n_layers=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean --model.n_layer?" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments",
    [[], ["quickstart"], ["--status", "0"], ["decide"], ["decide", "quickstart"], ["decide", "--status"],
     ["decide", "--status", "x", "quickstart"], ["decide", "--status", "-1"]],
)  # fmt: skip
def test_wrong_usage_ends_with_status_2_and_a_message(arguments: list[str]) -> None:
    done = command("hpcgpt.requeue", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(("error: usage:", "error: requeue decide needs --status N first"))


@pytest.mark.processes
def test_a_saved_attempt_is_requeued(slurm: FakeSlurm, run: Path) -> None:
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    status, output = decided(slurm, run, 143)
    assert status == 0
    assert "requeue of job 7: saved at step 1,200" in output
    assert slurm.requeued == ["7"]
    assert [event["event"] for event in run_folder.events(run)] == ["job", "requeue"]


@pytest.mark.processes
def test_a_finished_attempt_is_left_alone(slurm: FakeSlurm, run: Path) -> None:
    run_folder.write_exit(run, left(FINISHED))
    status, output = decided(slurm, run, 0)
    assert status == 0
    assert "no requeue of job 7: training is finished" in output
    assert slurm.requeued == []


@pytest.mark.processes
def test_a_cancelled_job_is_left_alone(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(state="COMPLETING")
    run_folder.write_exit(run, left(AGAIN, Stop.TERMINATED.message, saved=True))
    assert "no requeue of job 7" in decided(slurm, run, 143)[1]
    assert slurm.requeued == []


@pytest.mark.processes
@pytest.mark.parametrize("fields", [{"PreemptTime": "2026-01-02T03:04:05"}, {"Reason": "TimeLimit"}])
def test_a_job_that_slurm_ended_for_another_reason_is_requeued(
    fields: dict[str, Any], slurm: FakeSlurm, run: Path
) -> None:
    slurm.answers(state="COMPLETING", **fields)
    run_folder.write_exit(run, TERMINATED)
    assert "requeue of job 7: saved at step 1,200" in decided(slurm, run, 143)[1]
    assert slurm.requeued == ["7"]


@pytest.mark.processes
def test_the_exit_json_of_an_earlier_start_does_not_count(slurm: FakeSlurm, run: Path) -> None:
    """The second start was killed and wrote nothing; the exit.json in the folder is from the first one."""
    run_folder.write_exit(run, left(FINISHED))
    _, output = decided(slurm, run, 137, SLURM_RESTART_COUNT="1")
    assert "crash 1" in output
    assert slurm.requeued == ["7"]


@pytest.fixture
def save_step(run: Path) -> Iterator[Callable[[int], None]]:
    """A function that saves a checkpoint of a step into the run."""
    held = lease.acquire(run, "")
    yield lambda step: assert_saved(save(run / "checkpoints", step, held))
    held.release()


def assert_saved(problem: str) -> None:
    assert problem == ""


def begin(slurm: FakeSlurm, run: Path, **env: str) -> tuple[int, str]:
    """Run `requeue folder` as at the beginning of the batch script; return exit status and messages."""
    job = {"SLURM_JOB_ID": "7", "PATH": f"{slurm.folder}:/usr/bin:/bin"} | env
    done = command("hpcgpt.requeue", "folder", "--run.dir", str(run.parent), "--run.name", run.name, env=job)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def crash(slurm: FakeSlurm, run: Path, restart: int, job: str = "7") -> str:
    """Run a start that crashes; return the messages of the decision."""
    slurm.answers(restarts=restart)
    env = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restart)}
    assert begin(slurm, run, **env)[0] == 0
    return decided(slurm, run, 137, **env)[1]


@pytest.mark.processes
def test_three_crashes_without_a_new_checkpoint_end_the_job(
    slurm: FakeSlurm, run: Path, save_step: Callable[[int], None]
) -> None:
    output = [crash(slurm, run, restart) for restart in range(2)]
    save_step(10)
    output += [crash(slurm, run, restart) for restart in range(2, 4)]
    # The second start saved it, and crashed afterwards.
    assert ["crash loop" in text for text in output] == [False, False, False, True]
    assert len(slurm.requeued) == 3
    names = [row["event"] for row in rows(run / "events.jsonl")]
    assert (names.count("crash"), names.count("give_up")) == (4, 1)


@pytest.mark.processes
def test_crashes_of_an_older_job_with_the_same_id_do_not_count(slurm: FakeSlurm, run: Path) -> None:
    output = [crash(slurm, run, restart) for restart in (0, 1, 0, 1)]
    assert ["crash loop" in text for text in output] == [False] * 4
    assert len(slurm.requeued) == 4


@pytest.mark.processes
def test_two_jobs_that_crash_alternately_in_one_folder_are_both_ended(slurm: FakeSlurm, run: Path) -> None:
    """The `job` event of one job does not reset the crashes of the other."""
    output: dict[str, list[str]] = {"7": [], "8": []}
    for restart in range(3):
        for job in output:
            output[job].append(crash(slurm, run, restart, job))
    for texts in output.values():
        assert ["crash loop: 3 crashes" in text for text in texts] == [False, False, True]
    assert slurm.requeued == ["7", "8", "7", "8"]


@pytest.mark.processes
def test_after_going_back_progress_is_measured_from_the_older_checkpoint(
    slurm: FakeSlurm, run: Path, save_step: Callable[[int], None]
) -> None:
    """From step 10,000 back to 2,000: starts that train on from there make progress."""
    for step in (2_000, 10_000):
        run_folder.record(run, "save", step=step)
    save_step(2_000)
    for restart in range(12):
        env = {"SLURM_RESTART_COUNT": str(restart)}
        slurm.answers(restarts=restart)
        run_folder.record(run, "job", job=f"7_{restart}", newest_step=2_000 + restart * 100)
        run_folder.record(run, "start", attempt=restart + 1, job=f"7_{restart}", step=2_000 + restart * 100)
        save_step(2_100 + restart * 100)
        if restart < 11:
            run_folder.record(run, "requeue", job=f"7_{restart}")
            continue
        run_folder.write_exit(run, Exit(f"7_{restart}", AGAIN, Stop.TIME_LIMIT.message, 2_100, saved=True))
        assert "\nhpcgpt: requeue of job 7: " in "\n" + decided(slurm, run, 143, **env)[1]


@pytest.mark.processes
def test_a_job_that_slurm_keeps_requeueing_without_progress_is_refused_at_its_start(
    slurm: FakeSlurm, run: Path
) -> None:
    """Slurm requeues it after a preemption without a decision of ours."""
    for restart in range(9):
        run_folder.record(run, "job", job=f"7_{restart}", newest_step=0)
    assert begin(slurm, run, SLURM_RESTART_COUNT="9")[0] == 0
    status, output = begin(slurm, run, SLURM_RESTART_COUNT="10")
    assert status == requeue.REFUSED
    assert "job 7 is not started again: no progress: 10 starts in a row" in output
    assert begin(slurm, run, SLURM_JOB_ID="8")[0] == 0, "the count of another job starts over"
    assert begin(slurm, run, SLURM_RESTART_COUNT="11")[0] == 0, "the user requeued it nevertheless"


@pytest.mark.processes
def test_node_failures_are_recorded_also_where_slurm_has_requeued_the_job(slurm: FakeSlurm, run: Path) -> None:
    for restart in range(9):
        run_folder.record(run, "job", job=f"7_{restart}", newest_step=0)
        run_folder.record(run, "node_failed", job=f"7_{restart}")
    assert begin(slurm, run, SLURM_RESTART_COUNT="9")[0] == 0
    slurm.answers(state="PENDING", restarts=10, Reason="NodeDown")
    assert "Slurm has requeued it already" in decided(slurm, run, 137, SLURM_RESTART_COUNT="9")[1]
    assert run_folder.events(run)[-1] | {"event": "node_failed", "job": "7_9"} == run_folder.events(run)[-1]
    status, output = begin(slurm, run, SLURM_RESTART_COUNT="10")
    assert status == requeue.REFUSED
    assert "10 starts without a new checkpoint ended with a node failure" in output


@pytest.mark.processes
def test_a_controller_that_does_not_answer_for_a_while_is_waited_for(slurm: FakeSlurm, run: Path) -> None:
    slurm.away(times=2)
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    status, output = decided(slurm, run, 143)
    assert (status, slurm.requeued) == (0, ["7"]), output
    assert [event["event"] for event in run_folder.events(run)] == ["job", "requeue"]


@pytest.mark.processes
def test_a_requeue_whose_answer_was_lost_does_not_count_as_refused(slurm: FakeSlurm, run: Path) -> None:
    slurm.away(times=1, then_requeued=True)
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    status, output = decided(slurm, run, 143)
    assert status == 0, output
    assert "refuse" not in output
    assert [event["event"] for event in run_folder.events(run)] == ["job", "requeue"]


@pytest.mark.processes
def test_a_refused_requeue_ends_with_the_remedy(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(refuses=True)
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    status, output = decided(slurm, run, AGAIN, SLURM_JOB_NUM_NODES="2")
    assert status == 1
    assert (
        "Slurm refused to requeue job 7: Invalid; and to queue another job after it: the batch script could" in output
    )
    assert "Submit the same command again, it continues from the newest checkpoint:\n  sbatch --nodes=2 " in output


@pytest.mark.processes
def test_a_job_that_slurm_has_requeued_already_is_not_requeued_twice(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(state="PENDING", restarts=1)
    run_folder.write_exit(run, left(AGAIN, Stop.TERMINATED.message, saved=True))
    status, output = decided(slurm, run, AGAIN)
    assert status == 0
    assert "Slurm has requeued it already" in output
    assert slurm.requeued == []


@pytest.mark.processes
def test_a_damaged_exit_json_counts_as_a_crash(slurm: FakeSlurm, run: Path) -> None:
    (run / "exit.json").write_text(json.dumps({"status": 0}))
    assert "crash 1" in decided(slurm, run, 137)[1]


@pytest.mark.processes
def test_without_scontrol_there_is_a_message(slurm: FakeSlurm, run: Path) -> None:
    (slurm.folder / "scontrol").unlink()
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    status, output = decided(slurm, run, AGAIN, PATH=str(slurm.folder))
    assert status == 1
    assert "scontrol" in output


@pytest.mark.processes
def test_an_interactive_allocation_cannot_be_requeued(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(BatchFlag="0")
    run_folder.write_exit(run, TERMINATED)
    status, output = decided(slurm, run, AGAIN)
    assert status == 1
    assert "job 7 is an allocation of salloc, which Slurm cannot requeue: run the same command again" in output
    assert slurm.requeued == []


def start_in_allocation(slurm: FakeSlurm, run: Path) -> None:
    env = {"SLURM_JOB_ID": "7", "PATH": f"{slurm.folder}:/usr/bin:/bin"}
    done = command("hpcgpt.requeue", "folder", "--run.dir", str(run.parent), "--run.name", run.name, env=env)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_reports_of_an_earlier_start_in_the_same_allocation_do_not_count(slurm: FakeSlurm, run: Path) -> None:
    """Both are called 7_0. The first one saved and exited; the second is killed and writes nothing."""
    slurm.answers(BatchFlag="0")
    for round_ in range(2):
        start_in_allocation(slurm, run)
        crashed_on(run, f"n{round_}")
        (run / "faults" / "7_0").mkdir(parents=True)
        run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    start_in_allocation(slurm, run)
    (run / "logs" / "7_0.srun").write_text("srun: error: n5: task 0: Killed\n")
    _, output = decided(slurm, run, 137)
    assert "crash 1 since the last new checkpoint: rank 0 on n5" in output
    assert "n0" not in output
    assert sorted(path.name for path in (run / "logs").glob("7_0.srun.*")) == ["7_0.srun.1", "7_0.srun.2"]
    assert {"7_0.1", "7_0.2"} < {path.name for path in (run / "faults").iterdir()}, "beside those of this start"


def test_the_check_on_each_node_refuses_what_the_first_node_refuses(tmp_path: Path) -> None:
    """Else the job would be requeued: its configuration would look good on other nodes."""
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "run.json").write_text('{"id": "a"}')
    (moved / "config.toml").write_text(f'[run]\ndir = "{tmp_path}/old"\nname = "first"\n')
    for task in ("folder", "check"):
        with pytest.raises(UserError, match="names another"):
            requeue.main([task, f"{moved}/config.toml"])
    assert not (tmp_path / "old").exists()


@pytest.mark.processes
def test_reports_of_a_start_that_still_runs_are_not_moved(slurm: FakeSlurm, run: Path) -> None:
    """A second start in its allocation will be refused."""
    crashed_on(run, "n0")
    held = lease.acquire(run, "7_0")
    start_in_allocation(slurm, run)
    assert (run / "logs" / "7_0.srun").exists()
    held.release()
    start_in_allocation(slurm, run)
    assert not (run / "logs" / "7_0.srun").exists()


@pytest.mark.processes
def test_this_start_of_the_job_is_recorded(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(EligibleTime="1700000000", StartTime="1700000060")
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n[1-2,4]",
           "PATH": f"{slurm.folder}:/usr/bin:/bin"}  # fmt: skip
    done = command("hpcgpt.requeue", "folder", "--run.dir", str(run.parent), "--run.name", run.name, env=env)
    assert (done.returncode, done.stdout) == (0, f"{run}\n"), done.stderr
    (event,) = run_folder.events(run)
    assert event | {"event": "job", "job": "7_2", "newest_step": 0, "queued_at": 1700000000.0,
                    "started_at": 1700000060.0, "hosts": ["n1", "n2", "n4"]} == event  # fmt: skip


@pytest.mark.processes
def test_a_run_folder_belongs_to_one_task_of_an_array(slurm: FakeSlurm, run: Path) -> None:
    def task(array: str, number: str, name: str = "mine") -> tuple[int, str]:
        env = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": number,
               "PATH": f"{slurm.folder}:/usr/bin:/bin"}  # fmt: skip
        done = command("hpcgpt.requeue", "folder", "--run.dir", str(run.parent), "--run.name", name, env=env)
        return done.returncode, done.stderr

    assert task("7", "1")[0] == 0
    assert task("7", "1")[0] == 0  # it was requeued
    status, output = task("7", "2")
    assert status == 2
    assert "is the run folder of task 1 of this job array" in output
    assert "--run.name sweep-%a" in output
    assert task("7", "2", "other")[0] == 0
    assert task("8", "2")[0] == 0  # another array, later


EXCLUDE = ("--requeue.exclude_bad_nodes", "true")


def crashed_on(run: Path, host: str, attempt: str = "7_0") -> None:
    (run / "logs" / f"{attempt}.srun").write_text(f"srun: error: {host}: task 3: Killed\n")


def excluding(slurm: FakeSlurm, run: Path, restart: int) -> str:
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "PATH": f"{slurm.folder}:/usr/bin:/bin"}
    flags = ("--run.dir", str(run.parent), "--run.name", run.name, *EXCLUDE, "--requeue.max_crashes", "100")
    done = command("hpcgpt.requeue", "decide", "--status", "137", *flags, env=env)
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.processes
def test_bad_hosts_are_excluded_from_the_next_start_and_add_up(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(Partition="low", NumNodes="2", ExcNodeList="n[8-9]", ReqNodeList="(null)")
    slurm.has_nodes("n1 idle", "n2 mixed", "n3 allocated", "n4 idle", "n5 down*", "n6 drained", "n7 idle*")
    crashed_on(run, "n2")
    assert "the next start avoids n2" in excluding(slurm, run, 0)
    run_folder.record(run, "start", attempt=2)
    run_folder.record(run, "straggler", host="n4", factor=3.0)
    run_folder.record(run, "straggler", host="n1", factor=1.5)  # not slow enough
    crashed_on(run, "n3", "7_1")
    # n1 to n4 are usable and two are needed: the newest two are excluded, n2 comes back.
    assert "the next start avoids n3, n4" in excluding(slurm, run, 1)
    assert slurm.updates == ["update JobId=7 ExcNodeList=n8,n9,n2", "update JobId=7 ExcNodeList=n8,n9,n3,n4"]
    crashes = [event for event in run_folder.events(run) if event["event"] == "crash"]
    assert [(event["rank"], event["host"], event["excluded"]) for event in crashes] == [
        (3, "n2", ["n2"]), (3, "n3", ["n3", "n4"]),
    ]  # fmt: skip
    known = json.loads((run / "excluded_nodes.json").read_text())
    assert [entry["host"] for entry in known] == ["n2", "n4", "n3"]


def test_only_stragglers_of_the_newest_start_are_bad() -> None:
    """Earlier ones were judged then; the user may have removed one from the list since."""
    before = {"event": "straggler", "host": "n1", "factor": 9.0}
    assert bad_hosts(None, [{"event": "start"}, before, {"event": "start"}, before | {"host": "n2"}], 2.0) == {
        "n2": "steps took 9.0 times as long as usual"}  # fmt: skip


@pytest.mark.processes
def test_a_limited_number_of_hosts_is_remembered_the_newest(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(Partition="low", NumNodes="1")
    slurm.has_nodes(*(f"n{n} idle" for n in range(20)))
    for restart in range(10):
        crashed_on(run, f"n{restart}", f"7_{restart}")
        excluding(slurm, run, restart)
    known = json.loads((run / "excluded_nodes.json").read_text())
    assert [entry["host"] for entry in known] == [f"n{n}" for n in range(2, 10)]


def remembered(run: Path) -> list[str]:
    return [entry["host"] for entry in json.loads((run / "excluded_nodes.json").read_text())]


@pytest.mark.processes
def test_a_host_removed_from_the_file_comes_back_and_the_users_exclusions_stay(slurm: FakeSlurm, run: Path) -> None:
    """Slurm's list has both, without a distinction."""
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n[8-9]")
    slurm.has_nodes("n1 idle", "n2 idle", "n3 idle", "n4 idle")
    crashed_on(run, "n2")
    excluding(slurm, run, 0)
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n[2,8-9]")
    (run / "excluded_nodes.json").unlink()
    crashed_on(run, "n3", "7_1")
    excluding(slurm, run, 1)
    assert slurm.updates[1:] == ["update JobId=7 ExcNodeList=n8,n9,n3"]


@pytest.mark.processes
def test_a_host_comes_back_after_some_days_without_a_crash(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n2,n3,n4")
    slurm.has_nodes(*(f"n{n} idle" for n in range(9)))
    run_folder.record(run, "crash", job="7_0", excluded=["n2", "n3"])  # as earlier versions recorded it
    entries = [
        {"host": "n2", "reason": "killed", "time": time.time() - bad_nodes.KEEP_S - 1},
        {"host": "n3", "reason": "killed", "time": time.time() - bad_nodes.KEEP_S / 2},
        {"host": "n5", "reason": "the user's"},
    ]
    (run / "excluded_nodes.json").write_text(json.dumps(entries))
    run_folder.write_exit(run, Exit("7_1", AGAIN, Stop.TIME_LIMIT.message, 1200, saved=True))
    excluding(slurm, run, 1)
    assert slurm.updates == ["update JobId=7 ExcNodeList=n4,n5,n3"]
    assert remembered(run) == ["n3", "n5"]
    (event,) = [event for event in run_folder.events(run) if event["event"] == "excluded"]
    assert (event["job"], event["hosts"]) == ("7_1", ["n5", "n3"])


@pytest.mark.processes
def test_the_last_host_that_comes_back_leaves_an_empty_list(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n2")
    slurm.has_nodes("n1 idle", "n2 idle", "n3 idle")
    run_folder.record(run, "excluded", job="7_0", hosts=["n2"])
    run_folder.write_exit(run, Exit("7_1", AGAIN, Stop.TIME_LIMIT.message, 1200, saved=True))
    excluding(slurm, run, 1)
    assert slurm.updates == ["update JobId=7 ExcNodeList="]


@pytest.mark.processes
@pytest.mark.parametrize("case", ["another job's", "no nodes", "finished"])
def test_exclusions_that_are_not_ours_or_not_needed_any_more_stay(slurm: FakeSlurm, run: Path, case: str) -> None:
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n2")
    slurm.has_nodes(*([] if case == "no nodes" else ["n1 idle", "n2 idle", "n3 idle"]))
    # The user may have adopted the exclusions of an earlier job.
    run_folder.record(run, "excluded", job="6_0" if case == "another job's" else "7_0", hosts=["n2"])
    run_folder.write_exit(run, Exit("7_1", FINISHED if case == "finished" else AGAIN, "x", 1200, saved=True))
    excluding(slurm, run, 1)
    assert slurm.requeued == ([] if case == "finished" else ["7"])
    assert slurm.updates == []


@pytest.mark.processes
def test_exclusions_of_the_batch_script_are_adopted(slurm: FakeSlurm, run: Path) -> None:
    """Also without requeue.exclude_bad_nodes: no start was possible on those nodes."""
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n[2-4]", Comment="hpcgpt_avoid=n2,n3")
    slurm.has_nodes(*(f"n{n} idle" for n in range(9)))
    run_folder.write_exit(run, left(AGAIN, Stop.TIME_LIMIT.message, saved=True))
    assert "the next start avoids n3, n2" in decided(slurm, run, 75)[1]
    assert slurm.updates == ["update JobId=7 Comment="]
    assert remembered(run) == ["n2", "n3"]
    slurm.answers(Partition="low", NumNodes="1", ExcNodeList="n[2-4]")
    (run / "excluded_nodes.json").unlink()
    decided(slurm, run, 75)
    assert slurm.updates[1:] == ["update JobId=7 ExcNodeList=n4"]


@pytest.mark.processes
def test_only_node_names_that_slurm_knows_are_excluded(slurm: FakeSlurm, run: Path) -> None:
    """Slurm refuses the whole list if it contains an unknown name, and in a chain the whole next job."""
    slurm.answers(Partition="low", NumNodes="1")
    slurm.has_nodes("n1 idle", "n2 down", "n3 idle", "n4 idle")
    run_folder.record(run, "start", attempt=1)
    run_folder.record(run, "straggler", host="n3.cluster.org", factor=3.0)
    run_folder.record(run, "straggler", host="no-node-any-more", factor=3.0)
    crashed_on(run, "n2")
    assert "the next start avoids n2, n3 (" in excluding(slurm, run, 0)
    assert slurm.updates == ["update JobId=7 ExcNodeList=n2,n3"]


@pytest.mark.processes
@pytest.mark.parametrize("fields", [{"NumNodes": "3"}, {"NumNodes": "1", "ReqNodeList": "n[1-2]"}])
def test_hosts_that_the_job_needs_are_not_excluded(fields: dict[str, Any], slurm: FakeSlurm, run: Path) -> None:
    slurm.answers(Partition="low", **fields)
    slurm.has_nodes("n1 idle", "n2 idle", "n3 idle", "n4 down")
    crashed_on(run, "n2")
    assert "the next start avoids" not in excluding(slurm, run, 0)
    assert slurm.updates == []
    assert slurm.requeued == ["7"]


@pytest.mark.processes
def test_without_the_option_no_host_is_excluded(slurm: FakeSlurm, run: Path) -> None:
    slurm.has_nodes("n1 idle", "n2 idle", "n3 idle")
    crashed_on(run, "n2")
    assert "first to fail: rank 3 on n2: Killed" in decided(slurm, run, 137)[1]
    assert slurm.updates == []


# --- events of a start -----------------------------------------------------------------------------


def test_a_time_that_slurm_does_not_know_is_left_out_of_the_event() -> None:
    """slurmctld may not answer, and readers could fail on a null."""
    assert set(requeue.job_event(Job(""))) == {"hosts"}
    known = requeue.job_event(Job("RUNNING", fields={"StartTime": "8", "EligibleTime": "Unknown"}))
    assert known["started_at"] == 8.0
    assert "queued_at" not in known


@pytest.mark.processes
def test_a_decision_not_to_requeue_is_recorded(slurm: FakeSlurm, run: Path) -> None:
    slurm.answers("CANCELLED")
    decided(slurm, run, 143)
    (event,) = run_folder.events(run)
    assert (event["event"], event["job"], event["reason"]) == ("no_requeue", "7_0", "the job was cancelled")


@pytest.mark.processes
def test_what_cannot_be_counted_on_a_full_disk_is_left_to_the_batch_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each crash would count as the first one, endlessly; the batch script counts in the job's comment."""
    slurm = FakeSlurm(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    with small_disk(tmp_path / "disk", "256k") as disk:
        run = disk / "mine"
        run_folder.prepare(run)
        fill(disk)
        arguments = ["decide", "--status", "1", "--run.dir", str(disk), "--run.name", "mine"]
        assert requeue.main(arguments) == 1
        captured = capfd.readouterr()
        assert "decided" not in captured.out
        assert "crash 1 since the last new checkpoint" in captured.err
        assert "It could not be counted" in captured.err
        arguments[2] = "75"  # nor a start that was preempted before it was recorded
        assert requeue.main(arguments) == 1
        arguments[2] = "0"
        assert requeue.main(arguments) == 0
        assert capfd.readouterr().out == "decided\n"
    assert slurm.requeued == []


@pytest.mark.processes
def test_check_fails_on_a_node_where_folder_would(tmp_path: Path) -> None:
    """The batch script tries it on the job's other nodes: what fails on all of them is a user error."""
    (tmp_path / "file").write_text("")
    flags = ("quickstart", "--run.dir", str(tmp_path / "file"), "--run.name", "mine")
    for what in ("folder", "check"):
        done = command("hpcgpt.requeue", what, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot be a run folder" in done.stderr
    flags = ("quickstart", "--run.dir", str(tmp_path), "--run.name", "mine")
    tasks = [{"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": task} for task in "12"]
    assert [command("hpcgpt.requeue", "check", *flags, env=task).returncode for task in tasks] == [0, 2]
    assert run_folder.events(tmp_path / "mine") == []


@pytest.mark.processes
def test_a_crash_that_cannot_be_counted_is_not_requeued(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With another user's events.jsonl each crash would count as the first one, endlessly."""
    slurm, run = FakeSlurm(shared), shared / "runs" / "mine"
    run_folder.prepare(run)
    run_folder.record(run, "start", attempt=1, job="7_0", step=0)
    for path in [shared, *shared.rglob("*")]:
        path.chmod(0o777 if path.is_dir() or path.name == "scontrol" else 0o666)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    arguments = ["decide", "--status", "1", "--run.dir", str(run.parent), "--run.name", run.name]
    (run / "events.jsonl").chmod(0o444)
    with another_user():
        assert requeue.main(arguments) == 0
    output = capfd.readouterr().err
    assert "no requeue of job 7: it could not be counted (crash 1 since the last new checkpoint" in output
    assert f"chmod g+rw {run / 'events.jsonl'}" in output
    assert slurm.requeued == []
    (run / "events.jsonl").chmod(0o666)
    with another_user():
        assert requeue.main(arguments) == 0
    assert slurm.requeued == ["7"]
    assert [event["event"] for event in run_folder.events(run)] == ["start", "crash", "requeue"]
