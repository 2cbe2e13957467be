"""hpcgpt.training.loop: what the loop calls, and when. Two real ranks, stopped by a signal to one of them, and started
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.checkpoint.save import LONGEST_S
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from hpcgpt.storage import lease
from tests.programs import on_ranks
from tests.tiny_run import TINY, rows
from tests.training.ranks_loop import SLOW_S

pytestmark = pytest.mark.processes

Reports = list[dict[str, Any]]  # one dict for each rank


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop") / "runs" / "tiny"


def attempt(run: Path, shards: Path, hit: bool) -> Reports:
    config, out = run.parents[1] / "tiny.toml", run.parents[1] / f"report_{hit}"
    config.write_text(f'{TINY}\n[data]\ndir = "{shards}"\n'.replace("[run]", f'[run]\ndir = "{run.parent}"'))
    out.mkdir()
    done = on_ranks(2, "tests.training.ranks_loop", str(out), str(int(hit)), str(config), "--run.name", run.name)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def stopped(run: Path, shards_folder: Path) -> Reports:
    """Reports of steps 1 to 6 with a save at 4; stopped within the evaluation of step 6."""
    return attempt(run, shards_folder, hit=True)


@pytest.fixture(scope="module")
def finished(run: Path, shards_folder: Path, stopped: Reports) -> Reports:  # noqa: ARG001 (it continues from there)
    """Reports of that evaluation and steps 7 to 12 with a save at 8, to the end."""
    return attempt(run, shards_folder, hit=False)


def saves(rank: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(save[name] for name in names) for save in rank["saves"]]


def test_ranks_warm_up_before_anything_is_loaded_and_recover_leftovers_before_they_choose(
    stopped: Reports, finished: Reports
) -> None:
    for reports in (stopped, finished):
        order = [rank["order"] for rank in reports]
        assert [order[0][:3], order[1]] == [
            ["warm_up", "recover_leftovers", "newest_valid"],
            ["warm_up", "newest_valid"],
        ]
        assert set(order[0][3:]) <= {"recover_leftovers"}  # before old checkpoints are removed


def test_a_signal_to_one_rank_stops_both_within_the_evaluation(run: Path, stopped: Reports, finished: Reports) -> None:
    for rank in stopped:
        assert rank["status"] == AGAIN
        assert saves(rank, "step", "pending", "evaluated") == [(4, False, False), (6, True, False)]
    for rank in finished:
        assert rank["status"] == FINISHED
        assert saves(rank, "step", "pending") == [(8, False), (12, False)]
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert [row["step"] for row in metrics if "val/loss" in row] == [6, 12]


def test_a_checkpoint_has_its_counts_and_only_the_loss_of_its_own_step(finished: Reports) -> None:
    for rank in finished:
        assert saves(rank, "step", "tokens", "samples", "evaluated") == [
            (8, 8 * 8 * 32, 8 * 8, False), (12, 12 * 8 * 32, 12 * 8, True)]  # fmt: skip


def test_a_save_runs_during_steps_and_the_next_one_waits_for_it(stopped: Reports, finished: Reports) -> None:
    for reports in (stopped, finished):
        for rank in reports:
            assert saves(rank, "busy") == [(False,), (False,)]
            assert rank["polls"] > 0
        assert [rank["synced"] for rank in reports] == [2, 0], "rows have to be on the disk before each checkpoint is"


def test_after_a_signal_to_stop_no_old_checkpoints_are_removed(stopped: Reports, finished: Reports) -> None:
    assert [saves(rank, "prune_old") for rank in stopped] == [[(True,), (False,)]] * 2
    assert [saves(rank, "prune_old") for rank in finished] == [[(True,), (True,)]] * 2


def test_the_stop_flag_gets_the_durations_of_all_saves_also_of_earlier_attempts(
    stopped: Reports, finished: Reports
) -> None:
    durations = stopped[0]["save_takes"]
    assert len(durations) == 2
    assert min(durations) >= SLOW_S
    first, second, *durations = finished[0]["save_takes"]
    for earlier, seen in zip((first, second), stopped[0]["save_takes"], strict=True):
        assert SLOW_S <= earlier <= seen  # until the commit, without what follows it
    assert len(durations) == 2


def test_every_batch_of_an_evaluation_resets_the_watchdog(finished: Reports) -> None:
    """8 batches on 2 ranks; a long evaluation is not a hang."""
    assert [rank["evaluations"] for rank in finished] == [[4, 4], [4, 4]]


def test_a_checkpoint_may_take_as_long_to_load_as_to_save(finished: Reports) -> None:
    """Each of its passes, on each rank; other parts of the start may not."""
    for rank in finished:
        (choice_s, alive_before), (load_s, alive_after) = rank["loading"]
        assert choice_s == load_s == LONGEST_S
        assert alive_after > alive_before > 0


def test_where_a_checkpoint_has_no_generator_of_a_gpu_each_rank_seeds_its_own(finished: Reports) -> None:
    """As if the run was on CPUs before. Here there are no GPUs to seed, and the last seed that they would have got."""
    seeds = [rank["gpu_seeds"][-1] for rank in finished]
    assert seeds == [1 + 104729 * 6, 1 + 7919 + 104729 * 6]


def test_every_rank_has_a_watchdog_and_looks_for_a_newer_attempt(stopped: Reports) -> None:
    assert {"watchdog", "heartbeat"} <= set(stopped[0]["threads"])
    assert {"watchdog", "lease"} <= set(stopped[1]["threads"])
    assert [rank["watched"] for rank in stopped] == [True, True]


def test_only_rank_0_looks_for_the_stop_file(run: Path, stopped: Reports) -> None:
    assert [rank["stop_file"] for rank in stopped] == [str(run / "STOP"), "None"]
    assert [rank["end_margin_s"] for rank in stopped] == [60.0, 60.0]


def test_no_rank_exits_before_rank_0_has_reported_everything(run: Path, stopped: Reports, finished: Reports) -> None:
    """`srun -K` kills the remaining ranks when the first one exits."""
    for reports in (stopped, finished):
        assert reports[1]["left_at"] >= reports[0]["closed_at"]
    ended = run_folder.read_exit(run)
    assert ended is not None
    assert (ended.status, ended.step, ended.saved) == (FINISHED, 12, True)
    assert not lease.is_held(run), "the next attempt would wait for this one"
