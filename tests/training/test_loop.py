"""hpcgpt.training.loop: what the loop asks of its parts, and when. Two real ranks, told to stop by a signal to one of
them, and started again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from hpcgpt.storage import lease
from tests.programs import on_ranks
from tests.tiny_run import TINY, rows
from tests.training.ranks_loop import SLOW_S

Told = list[dict[str, Any]]  # by rank


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loop") / "runs" / "tiny"


def attempt(run: Path, shards: Path, hit: bool) -> Told:
    config, told = run.parents[1] / "tiny.toml", run.parents[1] / f"told_{hit}"
    config.write_text(f'{TINY}\n[data]\ndir = "{shards}"\n'.replace("[run]", f'[run]\ndir = "{run.parent}"'))
    told.mkdir()
    done = on_ranks(2, "tests.training.ranks_loop", str(told), str(int(hit)), str(config), "--run.name", run.name)
    assert done.returncode == 0, done.stderr
    return [json.loads((told / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def stopped(run: Path, shards_folder: Path) -> Told:
    """Steps 1 to 6, a save at 4; stopped within the evaluation of step 6."""
    return attempt(run, shards_folder, hit=True)


@pytest.fixture(scope="module")
def finished(run: Path, shards_folder: Path, stopped: Told) -> Told:  # noqa: ARG001 (it goes on from there)
    """That evaluation and steps 7 to 12, a save at 8; to the end."""
    return attempt(run, shards_folder, hit=False)


def saves(rank: dict[str, Any], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(save[name] for name in names) for save in rank["saves"]]


def test_ranks_warm_up_before_anything_is_loaded_and_clean_before_they_choose(stopped: Told, finished: Told) -> None:
    for told in (stopped, finished):
        order = [rank["order"] for rank in told]
        assert [order[0][:3], order[1]] == [["warm up", "clean", "choose"], ["warm up", "choose"]]
        assert set(order[0][3:]) <= {"clean"}  # before old checkpoints are removed


def test_a_signal_to_one_rank_stops_both_within_the_evaluation(run: Path, stopped: Told, finished: Told) -> None:
    for rank in stopped:
        assert rank["status"] == AGAIN
        assert saves(rank, "step", "pending", "evaluated") == [(4, False, False), (6, True, False)]
    for rank in finished:
        assert rank["status"] == FINISHED
        assert saves(rank, "step", "pending") == [(8, False), (12, False)]
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 13))
    assert [row["step"] for row in metrics if "val/loss" in row] == [6, 12]


def test_a_checkpoint_knows_how_far_it_is_and_the_loss_of_its_own_step_only(finished: Told) -> None:
    for rank in finished:
        assert saves(rank, "step", "tokens", "samples", "evaluated") == [
            (8, 8 * 8 * 32, 8 * 8, False), (12, 12 * 8 * 32, 12 * 8, True)]  # fmt: skip


def test_a_save_goes_on_behind_the_steps_and_the_next_one_waits_for_it(stopped: Told, finished: Told) -> None:
    for told in (stopped, finished):
        for rank in told:
            assert saves(rank, "busy") == [(False,), (False,)]
            assert rank["polls"] > 0
        assert [rank["synced"] for rank in told] == [2, 0], "rows have to be on the disk before each checkpoint is"


def test_who_is_told_to_leave_has_no_time_for_old_checkpoints(stopped: Told, finished: Told) -> None:
    assert [saves(rank, "tidy") for rank in stopped] == [[(True,), (False,)]] * 2
    assert [saves(rank, "tidy") for rank in finished] == [[(True,), (True,)]] * 2


def test_the_clock_is_told_how_long_each_save_took_and_those_of_earlier_attempts(stopped: Told, finished: Told) -> None:
    own = stopped[0]["save_takes"]
    assert len(own) == 2
    assert min(own) >= SLOW_S
    first, second, *own = finished[0]["save_takes"]
    for earlier, seen in zip((first, second), stopped[0]["save_takes"], strict=True):
        assert SLOW_S <= earlier <= seen  # until the commit, and not all that came behind it
    assert len(own) == 2


def test_the_watchdog_hears_of_every_round_of_an_evaluation(finished: Told) -> None:
    """8 batches on 2 ranks; a long evaluation is no hang."""
    assert [rank["evaluations"] for rank in finished] == [[4, 4], [4, 4]]


def test_every_rank_is_watched_and_looks_for_a_newer_attempt(stopped: Told) -> None:
    assert {"watchdog", "heartbeat"} <= set(stopped[0]["threads"])
    assert {"watchdog", "lease"} <= set(stopped[1]["threads"])
    assert [rank["watched"] for rank in stopped] == [True, True]


def test_rank_0_alone_looks_for_the_stop_file(run: Path, stopped: Told) -> None:
    assert [rank["looks_for"] for rank in stopped] == [str(run / "STOP"), "None"]
    assert [rank["end_margin_s"] for rank in stopped] == [60.0, 60.0]


def test_no_rank_leaves_before_rank_0_has_told_everything(run: Path, stopped: Told, finished: Told) -> None:
    """`srun -K` ends whoever is left when the first one leaves."""
    for told in (stopped, finished):
        assert told[1]["left_at"] >= told[0]["closed_at"]
    ended = run_folder.read_exit(run)
    assert ended is not None
    assert (ended.status, ended.step, ended.saved) == (FINISHED, 12, True)
    assert not lease.is_held(run), "the next attempt would watch for this one"
