"""hpcgpt/estimate/schedule.py: time, starts within a limit, the advised interval, and disk."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from hpcgpt.config.operation import Requeue
from hpcgpt.config.options import Checkpoint, Config, Eval, Run
from hpcgpt.estimate import rates, schedule
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.schedule import Habits

CONFIG = Config()  # 512 x 1024 tokens a step
TOKENS = 512 * 1024
USUAL = Habits(start_s=100.0, save_s=10.0, failure_s=200_000.0, assumed=())
RATE = rates.given(TOKENS / 2, "2 s a step")


def test_without_a_limit_everything_is_one_start() -> None:
    found = schedule.times(CONFIG, RATE, 1000, 8, USUAL)
    assert found is not None
    assert (found.seconds, found.step_s, found.starts, found.requeues) == (2000.0, 2.0, 1, 0)
    assert found.gpu_hours == pytest.approx(8 * (2000 + 110) / 3600)


def test_a_limit_makes_starts_of_equal_length() -> None:
    # 1,000 s: 100 for the start, 120 from Slurm's warning to the end, 390 steps of 2 s between.
    found = schedule.times(CONFIG, RATE, 1000, 8, USUAL, limit_s=1000)
    assert found is not None
    assert (found.steps_per_start, found.starts, found.requeues) == (390, 3, 2)


@pytest.mark.parametrize(("end_margin_s", "lead_s", "steps"), [(60.0, 300, 300), (300.0, 120, 300), (0.0, 10, 439)])
def test_a_start_ends_at_the_warning_or_at_the_margin_or_early_enough_to_save(
    end_margin_s: float, lead_s: int, steps: int
) -> None:
    config = dataclasses.replace(CONFIG, requeue=Requeue(end_margin_s=end_margin_s))
    found = schedule.times(config, RATE, 1000, 8, USUAL, limit_s=1000, lead_s=lead_s)
    assert found is not None
    assert found.steps_per_start == steps


def test_a_limit_that_leaves_no_step_gives_no_time() -> None:
    assert schedule.times(CONFIG, RATE, 1000, 8, USUAL, limit_s=221) is None
    found = schedule.times(CONFIG, RATE, 1000, 8, USUAL, limit_s=222)
    assert found is not None
    assert found.steps_per_start == 1


def test_a_run_without_steps_takes_no_time() -> None:
    found = schedule.times(CONFIG, RATE, 0, 8, USUAL, limit_s=1000)
    assert found is not None
    assert (found.seconds, found.starts) == (0.0, 1)


def test_the_interval_is_the_root_of_twice_save_times_failure() -> None:
    found = schedule.times(CONFIG, RATE, 10_000, 8, USUAL)
    assert found is not None
    assert found.checkpoint_every_s == math.sqrt(2 * 10 * 200_000) == 2000.0
    assert found.checkpoint_every == 1000


def test_the_interval_is_no_longer_than_a_start() -> None:
    found = schedule.times(CONFIG, RATE, 10_000, 8, USUAL, limit_s=1000)
    assert found is not None
    assert found.checkpoint_every == found.steps_per_start == 390


def test_evaluations_and_saves_count() -> None:
    # 1,000 steps: 4 evaluations (every 250), and 1 save before the last step (every 500).
    usual = dataclasses.replace(USUAL, eval_s=30.0, stall_s=7.0)
    found = schedule.times(CONFIG, RATE, 1000, 8, usual)
    assert found is not None
    assert (found.evaluations, found.evaluation_s, found.saves, found.stalls_s) == (4, 120.0, 1, 7.0)
    assert found.seconds == 2000.0
    assert found.total_s == 2000 + 120 + 7 + 110
    assert found.gpu_hours == pytest.approx(8 * found.total_s / 3600)


def test_the_steps_of_a_start_leave_room_for_evaluations() -> None:
    usual = dataclasses.replace(USUAL, eval_s=500.0)  # as much as 250 steps
    found = schedule.times(CONFIG, RATE, 1000, 8, usual, limit_s=1000)
    assert found is not None
    assert (found.steps_per_start, found.starts) == (195, 6)


@pytest.mark.parametrize(
    ("steps", "evaluations", "saves"), [(0, 0, 0), (1, 1, 0), (250, 1, 0), (251, 2, 0), (500, 2, 0), (501, 3, 1)]
)
def test_the_last_step_is_evaluated_and_its_save_belongs_to_the_end(steps: int, evaluations: int, saves: int) -> None:
    found = schedule.times(CONFIG, RATE, steps, 8, USUAL)
    assert found is not None
    assert (found.evaluations, found.saves) == (evaluations, saves)


def test_a_run_that_neither_evaluates_nor_saves_has_no_time_for_it() -> None:
    config = dataclasses.replace(CONFIG, eval=Eval(every=0), checkpoint=Checkpoint(every=0))
    usual = dataclasses.replace(USUAL, eval_s=30.0, stall_s=7.0)
    found = schedule.times(config, RATE, 1000, 8, usual)
    assert found is not None
    assert (found.evaluations, found.saves, found.total_s) == (0, 0, 2110.0)


def test_habits_are_assumed_where_nothing_was_measured() -> None:
    found = schedule.habits(CONFIG, Pace(0), ranks=16_384, saved_bytes=3 * 10**9)
    assert (found.start_s, found.save_s, found.eval_s, found.stall_s) == (120.0, 3.0, 0.0, 0.0)
    assert found.failure_s == pytest.approx(54 * 86_400 / 419)
    assert len(found.assumed) == 5


def test_habits_are_what_was_measured() -> None:
    measured = Pace(20, 2.0, 100.0, eval_s=3.0, stall_s=0.5, save_s=10.0, start_s=40.0)
    assert schedule.habits(CONFIG, measured, 1, 10**9, failure_s=1e5) == Habits(40.0, 10.0, 1e5, (), 3.0, 0.5)


def test_that_evaluations_on_tasks_are_not_counted_is_said() -> None:
    config = dataclasses.replace(CONFIG, eval=Eval(tasks=("a.jsonl",), tasks_every=CONFIG.eval.every))
    more = set(schedule.habits(config, Pace(0), 8, 1).assumed) - set(schedule.habits(CONFIG, Pace(0), 8, 1).assumed)
    assert more == {"evaluations on eval.tasks take no time: they are not measured"}


def test_nothing_is_assumed_of_what_a_run_does_not_do() -> None:
    config = dataclasses.replace(CONFIG, eval=Eval(every=0), checkpoint=Checkpoint(every=0))
    found = schedule.habits(config, Pace(0), 1, 10**9, failure_s=1e5, save_s=3.0)
    assert found.assumed == ("a start takes 120 s",)


@pytest.mark.parametrize(
    ("keep", "evaluated", "steps", "kept", "most"),
    [
        (Checkpoint(every=100, keep_last=3, keep_best=False), True, 1000, 3, 5),
        (Checkpoint(every=100, keep_last=3, keep_best=True), True, 1000, 4, 6),
        (Checkpoint(every=100, keep_last=3, keep_best=True), False, 1000, 3, 5),
        (Checkpoint(every=100, keep_last=3, keep_best=False, keep_every=500), True, 1000, 5, 7),
        (Checkpoint(every=0, keep_last=3), True, 1000, 1, 2),  # only the last
        (Checkpoint(every=100, keep_last=3), True, 200, 2, 3),  # no more than there are
    ],
)
def test_disk(tmp_path: Path, keep: Checkpoint, evaluated: bool, steps: int, kept: int, most: int) -> None:
    run = Run(dir=str(tmp_path / "not" / "yet"))
    config = dataclasses.replace(CONFIG, checkpoint=keep, eval=Eval(every=250 if evaluated else 0), run=run)
    found = schedule.disk(config, steps, 10**6)
    assert (found.kept, found.needed_bytes) == (kept, most * 10**6)
    assert found.folder == str(tmp_path)
    assert found.is_enough


def sparse_checkpoints(run: Path, names: list[str], size: int) -> None:
    """Make files of `size` bytes that take no room, as tensors of checkpoints."""
    for name in names:
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        with open(folder / "tensors.safetensors", "wb") as file:
            file.truncate(size)


def test_checkpoints_that_are_there_need_no_more_room(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, run=Run(dir=str(tmp_path)), checkpoint=Checkpoint(every=100))
    empty = schedule.disk(config, 1000, 1)
    assert empty.free_bytes is not None
    size = empty.free_bytes // 4  # 6 of them have no room beside each other, and 2 have
    assert schedule.disk(config, 1000, size).is_enough is False
    others = ["damaged_step_000000100.g1", "newer_than_000000300.g1/step_000000400", ".step_000000800.g1.tmp"]
    sparse_checkpoints(config.run_folder, others, size)
    assert schedule.disk(config, 1000, size).is_enough is False  # these stay beside the others
    sparse_checkpoints(config.run_folder, [f"step_{step:09}" for step in (400, 500, 600, 700)], size)
    found = schedule.disk(config, 1000, size)
    assert (found.needed_bytes, found.there_bytes, found.is_enough) == (6 * size, 4 * size, True)


def test_disk_that_is_not_enough(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, run=Run(dir=str(tmp_path)))
    assert schedule.disk(config, 1000, 10**18).is_enough is False
