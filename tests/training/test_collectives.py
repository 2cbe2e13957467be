"""hpcgpt.training.loop and step: the collectives of a turn of the loop, counted in real runs of two ranks, and the step
at which a signal to one of them stops both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from tests.programs import on_ranks
from tests.tiny_run import TINY
from tests.training.ranks_collectives import COMMITTED, SAVED, WRITTEN

pytestmark = pytest.mark.processes

# Two blocks and the rest; a step has two micro-batches.
GRADIENTS = {
    "ddp": {"allreduce_": 1},
    "zero1": {"_allgather_base_": 3, "_reduce_scatter_base_": 3, "allreduce_": 1},
    "zero2": {"_allgather_base_": 3, "_reduce_scatter_base_": 2 * 3, "allreduce_": 1},
    "fsdp": {"_allgather_base_": 2 * 5, "_reduce_scatter_base_": 2 * 3, "allreduce_": 1},
}
NORM = {"ddp": [], "zero1": [1], "zero2": [1], "fsdp": [1]}  # of shards; part of the gradients' collectives
VECTOR = 1 + 4 + 2  # loss, reasons to stop, stages of a save
STEPS = COMMITTED + 3


class Runs:
    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.config = folder, folder / "tiny.toml"
        self.config.write_text(f'{TINY}\n[data]\ndir = "{shards}"\n'.replace("[run]", f'[run]\ndir = "{folder}/runs"'))

    def start(self, name: str, status: int, faults: dict[str, Any], *flags: str) -> dict[int, dict[str, Any]]:
        """Run two ranks; return the collectives of each turn, by step: those of rank 0."""
        out = self.folder / f"out_{name}"
        out.mkdir()
        plan = ["--run.name", name, "--train.steps", str(STEPS), "--checkpoint.every", str(SAVED), "--eval.every", "0"]
        plan += ["--train.micro_batch", "2"]
        arguments = [str(out), json.dumps(faults), str(self.config), *plan, *flags]
        done = on_ranks(2, "tests.training.ranks_collectives", *arguments)
        assert done.returncode == status, done.stderr
        first, second = (json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(2))
        assert collectives(first) == collectives(second)
        return {int(step): turn for step, turn in first.items()}

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name


def collectives(turns: dict[str, Any]) -> dict[str, Any]:
    """Leave out messages along the tree of the ranks: one sends what the other receives."""
    return {step: {"small": turn["small"], "kinds": {kind: count for kind, count in turn["kinds"].items()
                                                     if kind not in ("send", "recv_")}}
            for step, turn in turns.items()}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("collectives"), shards_folder)


def only_gradients_and_a_vector(mode: str, of_the_step_before: bool) -> dict[str, Any]:
    small = [VECTOR, *NORM[mode]] if of_the_step_before else [*NORM[mode], VECTOR]
    kinds = GRADIENTS[mode] | {"allreduce_": len(NORM[mode]) + 1 + (mode == "ddp")}
    return {"kinds": kinds, "small": small}


@pytest.mark.parametrize(
    ("mode", "late", "skip"),
    [
        ("ddp", False, False),
        ("zero1", False, False),
        ("zero2", False, False),
        ("fsdp", True, False),
        ("ddp", True, True),
    ],
)
def test_a_step_has_the_collectives_of_its_gradients_and_one_more_also_during_a_save(
    runs: Runs, mode: str, late: bool, skip: bool
) -> None:
    flags = ("--parallel.mode", mode, "--train.on_nonfinite", "skip" if skip else "stop")
    turns = runs.start(mode + "_late" * late, FINISHED, {"late": late}, *flags)
    assert sorted(turns) == list(range(1, STEPS + 1))
    # A save begins, and its first two stages end: if votes are given within a step, and read late, in the next turn.
    saving = {SAVED, WRITTEN + (late and skip), COMMITTED + (late and skip)}
    # The first turn has the end of the start. The step that is saved is not read late, so that nothing is left for the
    # turn after it.
    others = saving | {1} | ({SAVED + 1} if late else set())
    ordinary = set(range(1, COMMITTED + 1)) - others
    assert {SAVED - 1, WRITTEN - 1, COMMITTED - 1} < ordinary, "before a save, and in each of its stages"
    expected = only_gradients_and_a_vector(mode, late and not skip)
    assert {step: turns[step] for step in ordinary} == dict.fromkeys(ordinary, expected)
    for step in saving:
        assert sum(turns[step]["kinds"].values()) > sum(expected["kinds"].values()), "nothing has advanced the save"


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_to_one_rank_at_the_end_of_its_step_stops_both_after_it_or_read_late_one_step_later(
    runs: Runs, late: bool
) -> None:
    for hit in (3, SAVED):
        name = f"stopped_{late}_{hit}"
        runs.start(name, AGAIN, {"late": late, "stop": hit})
        ended = run_folder.read_exit(runs.run(name))
        assert ended is not None
        # A step that is saved is read at once, so that its votes are known then.
        assert ended.step == hit + (late and hit != SAVED)
        assert ended.reason == "the time limit is near"
