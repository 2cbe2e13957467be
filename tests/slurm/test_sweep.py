"""hpcgpt.slurm.sweep: which runs a grid has, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.slurm import sweep


def test_without_a_grid_there_is_one_run_with_its_own_arguments() -> None:
    assert sweep.expand(["quickstart", "--run.seed", "2"], []) == [["quickstart", "--run.seed", "2"]]


def test_every_combination_is_a_run_named_after_its_values() -> None:
    found = sweep.expand(["quickstart", "--train.steps", "9"], ["optim.lr=1e-3,3e-3", "run.seed=1,2"])
    settings = [sources.from_command_line(arguments, "submit", "") for arguments in found]
    assert [(each.run.name, each.optim.lr, each.run.seed, each.train.steps) for each in settings] == [
        ("quickstart-lr1e-3-seed1", 1e-3, 1, 9), ("quickstart-lr1e-3-seed2", 1e-3, 2, 9),
        ("quickstart-lr3e-3-seed1", 3e-3, 1, 9), ("quickstart-lr3e-3-seed2", 3e-3, 2, 9),
    ]  # fmt: skip


def test_configurations_may_be_an_axis_and_name_their_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[run]\nseed = 7\n")
    found = sweep.expand(["--run.threads=1"], [f"CONFIG={tmp_path}/mine.toml,quickstart", "model.dropout=0,0.1"])
    settings = [sources.from_command_line(arguments, "submit", "") for arguments in found]
    assert [(each.run.name, each.run.seed, each.model.dropout) for each in settings] == [
        ("mine-dropout0", 7, 0.0), ("mine-dropout0.1", 7, 0.1),
        ("quickstart-dropout0", 1, 0.0), ("quickstart-dropout0.1", 1, 0.1),
    ]  # fmt: skip


def test_a_value_that_is_no_name_of_a_folder_is_replaced_in_the_name() -> None:
    ((*_, name),) = sweep.expand(["--run.name=a"], ["data.dir=/data/x y"])
    assert name == "--run.name=a-dir_data_x_y"


@pytest.mark.parametrize(
    ("training", "grid", "message"),
    [
        ([], ["optim.lr"], "--grid optim.lr: expected KEY=VALUE,VALUE"),
        ([], ["optim.lr=1,"], "--grid optim.lr=1,: expected KEY=VALUE,VALUE"),
        ([], ["optim.lr=1e-4,1e-4"], "1e-4 is there twice"),
        ([], ["run.seed=1", "run.seed=2"], "--grid run.seed is given twice"),
        ([], ["run.name=a,b"], "--grid run.name: runs are named by their values"),
        ([], ["optim.rl=1,2"], "unknown flag --optim.rl"),
        (["quickstart"], ["CONFIG=gpt2-124m"], "the configuration is in the grid, gpt2-124m, and outside"),
        ([], ["run.seed=" + ",".join(map(str, range(40))), "optim.lr=" + ",".join(f"1e-{n}" for n in range(1, 31))],
         "this grid has 1,200 runs, and 1,000 are the most"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_grid_is_refused(training: list[str], grid: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sweep.expand(training, grid)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "both"),
    [
        (["CONFIG=a/small.toml,b/small.toml"],
         "CONFIG=a/small.toml and of CONFIG=b/small.toml would both have runs/small"),
        (["CONFIG=a/named.toml,b/named_too.toml", "run.seed=1,2"],
         "CONFIG=a/named.toml run.seed=1 and of CONFIG=b/named_too.toml run.seed=1 would both have runs/mine-seed1"),
        (["data.dir=/d/a_b,/d/a/b"], "data.dir=/d/a_b and of data.dir=/d/a/b would both have runs/gpt2-dir_d_a_b"),
    ],
)  # fmt: skip
def test_two_runs_in_the_same_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: list[str], both: str
) -> None:
    monkeypatch.chdir(tmp_path)
    named = 'name = "mine"'
    for name, text in (("a/small", ""), ("b/small", ""), ("a/named", named), ("b/named_too", named)):
        path = tmp_path / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"[run]\n{text}\n")
    with pytest.raises(UserError) as caught:
        sweep.expand([], grid)
    assert both in str(caught.value)


def test_two_runs_of_the_same_name_in_different_folders_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "small.toml").write_text(f'[run]\ndir = "{name}/runs"\n')
    found = sweep.expand([], ["CONFIG=a/small.toml,b/small.toml"])
    settings = [sources.from_command_line(arguments, "submit", "") for arguments in found]
    assert [each.run_folder for each in settings] == [Path("a/runs/small"), Path("b/runs/small")]
