"""hpcgpt.slurm.restart_history: what each start of a job gained, and the counts that the requeue policy decides by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.slurm.restart_history import RestartHistory, count_restarts, newest_step, starts, without_older_job
from tests.checkpoint.small_checkpoints import flip_byte, names, write_manifest

Event = dict[str, Any]


class RecordedRun:
    """Events of a run folder, added one start after the other. The clock advances with them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now, self.attempt, self.job = 1000.0, 0, ""

    def add(self, event: str, **fields: Any) -> RecordedRun:
        self.events.append({"time": self.now, "event": event, **fields})
        return self

    def begin(self, job: str, newest: int | None = None) -> RecordedRun:
        """Record a start of the batch script: `requeue folder` ran."""
        self.job = job
        return self.add("job", job=job, **({} if newest is None else {"newest_step": newest}))

    def ready(self, step: int, start_s: float = 20.0) -> RecordedRun:
        """Record that the ranks are ready to step, after `start_s`."""
        self.attempt += 1
        began_at, self.now = self.now, self.now + start_s
        self.add("start", attempt=self.attempt, job=self.job, step=step, began_at=began_at)
        return self.add("ready", attempt=self.attempt, step=step)

    def save(self, step: int, trained_s: float = 100.0, save_s: float = 5.0) -> RecordedRun:
        self.now += trained_s + save_s
        return self.add("save", attempt=self.attempt, step=step, seconds=save_s)

    def crash(self) -> RecordedRun:
        return self.add("crash", job=self.job)

    def requeue(self) -> RecordedRun:
        return self.add("requeue", job=self.job)

    def chain(self, next_job: str) -> RecordedRun:
        return self.add("chain", job=self.job, next_job=next_job)

    def counts(self, job: str, newest: int | None) -> tuple[int, int, int]:
        found = count_restarts(self.events, job, newest)
        return found.crashes, found.node_failures, found.without_progress


def test_without_events_the_history_is_empty() -> None:
    assert count_restarts([], "7_0", 0) == count_restarts([], "", None) == RestartHistory()


def test_a_start_that_trained_longer_than_it_took_to_start_made_progress() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0, start_s=20.0).save(8, trained_s=15.0).save(12, trained_s=5.0)
    (start,) = starts(run.events, "7_0", 12)
    # From ready to the copy of the newest checkpoint: the earlier save was written while training continued.
    assert (start.from_step, start.to_step, start.start_s, start.trained_s) == (0, 12, 20.0, 25.0)
    assert (start.gained, start.without_progress) == (True, False)
    assert start.summary == "took 20 s until its first step and trained for 25 s, 12 steps"


@pytest.mark.parametrize(("trained_s", "without_progress"), [(19.9, 1), (20.0, 0)])
def test_a_start_that_trained_for_less_time_than_it_took_to_start_made_no_progress(
    trained_s: float, without_progress: int
) -> None:
    run = RecordedRun().begin("7_0", 0).ready(0, start_s=20.0).save(1, trained_s)
    assert run.counts("7_0", 1) == (0, 0, without_progress)


def test_starts_that_gain_one_step_each_add_up() -> None:
    run = RecordedRun()
    for restart in range(6):
        run.begin(f"7_{restart}", restart).ready(restart, start_s=25.0).save(restart + 1, trained_s=2.0).requeue()
        assert run.counts(f"7_{restart}", restart + 1) == (0, 0, restart + 1)
    run.begin("7_6", 6).ready(6, start_s=25.0).save(9, trained_s=30.0)
    assert run.counts("7_6", 9) == (0, 0, 0)


def test_a_job_that_is_preempted_often_and_gains_each_time_makes_progress() -> None:
    run = RecordedRun()
    for restart in range(50):
        run.begin(f"7_{restart}", restart * 10).ready(restart * 10, start_s=60.0)
        run.save(restart * 10 + 10, trained_s=90.0).requeue()
    assert run.counts("7_49", 500) == (0, 0, 0)


def test_a_starts_gain_is_read_from_the_checkpoints_also_if_its_save_event_is_lost() -> None:
    run = RecordedRun().begin("7_0", 4).ready(4).crash()
    assert not starts(run.events, "7_0", 4)[-1].gained
    assert starts(run.events, "7_0", 8)[-1].gained
    # Its times are not known then, so it counts as progress.
    assert run.counts("7_0", 8) == (0, 0, 0)
    run.begin("7_1", 8).ready(8)
    assert [start.gained for start in starts(run.events, "7_1", 8)] == [True, False]


def test_without_a_view_of_the_checkpoints_the_events_count() -> None:
    run = RecordedRun().begin("7_0", 4).ready(4).save(8)
    assert starts(run.events, "7_0", None)[-1].to_step == 8


def test_a_start_that_never_got_ready_gained_nothing() -> None:
    run = RecordedRun().begin("7_0", 4).crash().begin("7_1", 4).crash().begin("7_2", 4)
    assert run.counts("7_2", 4) == (2, 0, 3)
    (*_, last) = starts(run.events, "7_2", 4)
    assert last.summary == "made no new checkpoint"


def test_crashes_count_since_the_last_start_that_gained() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0).crash().begin("7_1", 0).ready(0).save(4).crash()
    assert run.counts("7_1", 4) == (0, 0, 0), "the end that is being decided about does not count"
    run.begin("7_2", 4)
    assert run.counts("7_2", 4) == (1, 0, 1)
    run.ready(4).crash().begin("7_3", 4).ready(4)
    assert run.counts("7_3", 4) == (2, 0, 2)


def test_a_checkpoint_that_is_damaged_each_time_is_no_gain() -> None:
    """Each start resumes at step 2, saves step 4 and crashes; the next start finds step 4 damaged."""
    run = RecordedRun().begin("7_0", 2).ready(2).save(4).crash()
    assert run.counts("7_0", 4)[0] == 0
    for restart in (1, 2):
        run.begin(f"7_{restart}", 4).ready(2).save(4).crash()
        assert run.counts(f"7_{restart}", 4)[0] == restart


def test_a_start_from_an_older_checkpoint_is_measured_against_it() -> None:
    """The user removed every checkpoint after step 2,000."""
    run = RecordedRun().begin("7_0", 0).ready(0).save(10_000).requeue()
    for restart in range(1, 12):
        step = 1_900 + restart * 100
        run.begin(f"8_{restart}", step).ready(step).save(step + 100).requeue()
        assert run.counts(f"8_{restart}", step + 100) == (0, 0, 0)


def test_within_one_chain_going_back_costs_at_most_two_starts() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0).save(10_000).requeue()
    without_progress = []
    for restart in range(1, 12):
        step = 1_900 + restart * 100
        run.begin(f"7_{restart}", step).ready(step).save(step + 100).requeue()
        without_progress.append(run.counts(f"7_{restart}", step + 100)[2])
    assert max(without_progress) <= 2
    assert without_progress[-1] == 0


def test_another_jobs_events_neither_add_nor_reset() -> None:
    """Job 8 is refused each time, since 7 holds the folder."""
    run = RecordedRun()
    for restart in range(3):
        run.begin(f"7_{restart}", 0).ready(0).crash().begin(f"8_{restart}", 0).crash()
    assert count_restarts(run.events, "7_3", 0).crashes == 3
    assert count_restarts(run.events, "8_3", 0).crashes == 3


def test_steps_that_another_job_trained_are_no_gain_of_this_one() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0).crash().begin("8_0", 0).ready(0).save(100).begin("7_1", 100).ready(100)
    assert [start.gained for start in starts(run.events, "7_1", 100)] == [False, False]
    assert [start.gained for start in starts(run.events, "8_0", 100)] == [True]


def test_a_chain_of_jobs_counts_as_one_and_another_submission_starts_over() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0).crash().chain("8").begin("8_0", 0).ready(0).crash().chain("9")
    assert count_restarts(run.events, "9_0", 0).crashes == 2
    assert count_restarts(run.events, "10_0", 0) == RestartHistory()


def test_after_a_give_up_a_manual_restart_starts_over() -> None:
    run = (
        RecordedRun().begin("7_0", 0).crash().begin("7_1", 0).crash().add("give_up", job="7_1").begin("7_2", 0).crash()
    )
    assert count_restarts(run.events, "7_3", 0) == RestartHistory(1, 0, 1, starts(run.events, "7_2", 0)[-1])


def test_a_failed_node_has_a_count_of_its_own() -> None:
    run = RecordedRun().begin("7_0", 0).ready(0).requeue()
    for restart in range(1, 4):
        run.begin(f"7_{restart}", 0).add("node_failed", job=f"7_{restart}")
    assert count_restarts(run.events, "7_4", 0).node_failures == 3
    assert count_restarts(run.events, "7_4", 0).without_progress == 1
    run.begin("7_4", 0).ready(0).save(8).add("node_failed", job="7_4")
    assert count_restarts(run.events, "7_5", 8).node_failures == 1


def test_events_of_older_versions_count_too() -> None:
    """They have no newest step in `job`, no `ready` and no `began_at`."""
    events: list[Event] = []
    for restart, step in enumerate((0, 4, 8)):
        events += [{"event": "job", "job": f"7_{restart}", "time": 1.0}]
        events += [{"event": "start", "job": f"7_{restart}", "attempt": restart + 1, "step": step, "time": 2.0}]
        events += [{"event": "save", "attempt": restart + 1, "step": step + 4, "time": 3.0}]
        events += [{"event": "crash", "job": f"7_{restart}", "time": 4.0}]
    found = count_restarts(events, "7_2", 12)
    assert (found.crashes, found.without_progress) == (0, 0)


def test_chain_events_that_form_a_circle_are_followed_once() -> None:
    run = RecordedRun().begin("7_0", 0).chain("8").begin("8_0", 0).chain("7")
    assert len(starts(run.events, "8_0", 0)) == 2


# --- the newest checkpoint ---------------------------------------------------------------------------


def test_the_newest_step_is_that_of_the_newest_checkpoint_with_a_valid_structure(three_checkpoints: Path) -> None:
    assert newest_step(three_checkpoints) == 12
    flip_byte(three_checkpoints / "step_000000012")
    assert newest_step(three_checkpoints) == 12, "checksums are not read"
    (three_checkpoints / "step_000000012/manifest.json").unlink()
    assert newest_step(three_checkpoints) == 8
    manifest = json.loads((three_checkpoints / "step_000000004/manifest.json").read_text())
    write_manifest(three_checkpoints / "step_000000008", manifest | {"version": 99})
    assert newest_step(three_checkpoints) == 4
    assert len(names(three_checkpoints)) == 3, "nothing is removed"


def test_without_a_checkpoint_the_newest_step_is_0(checkpoints: Path) -> None:
    assert newest_step(checkpoints) == newest_step(checkpoints / "none") == 0


def test_an_unreadable_folder_has_an_unknown_newest_step(checkpoints: Path) -> None:
    (checkpoints / "file").write_text("")
    assert newest_step(checkpoints / "file") is None


def test_an_older_job_with_the_same_id_does_not_count() -> None:
    """Ids begin again some day, and two clusters may share a disk."""
    run = RecordedRun()
    for restart in range(3):
        run.begin(f"57_{restart}", 0).ready(0).crash()
    run.chain("58").begin("58_0", 0).ready(0).crash()
    assert run.counts("57_2", 0)[0] == 2
    assert without_older_job(run.events, "57_2") == run.events
    run.begin("57_0", 0)
    run.events = [dict(event) for event in without_older_job(run.events, "57_0")]
    assert [event.get("job") for event in run.events if event["event"] == "job"] == ["58_0", "57_0"]
    assert not any(event["event"] == "chain" for event in run.events)
    assert run.ready(0).crash().begin("57_1", 0).counts("57_1", 0)[0] == 1
    assert without_older_job(run.events, "57_1") == run.events
