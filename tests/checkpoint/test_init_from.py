"""hpcgpt.checkpoint.init_from: a run that begins with the weights of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_prep.encode import find_tokenizer
from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from hpcgpt.tokenizer import save_load
from tests.programs import command
from tests.tiny_run import TINY, rows, tensors

pytestmark = pytest.mark.processes

LAST = "checkpoints/step_000000012"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path) -> Path:
    """A folder with a run of 12 steps and its configuration."""
    home = tmp_path_factory.mktemp("trained")
    text = TINY.replace("[run]", f'[run]\nname = "first"\ndir = "{home / "runs"}"')
    (home / "tiny.toml").write_text(f'{text}\n[data]\ndir = "{shards_folder}"\n')
    assert command("hpcgpt.train", str(home / "tiny.toml")).returncode == FINISHED
    return home


def start(home: Path, name: str, source: Path | str, *flags: str) -> tuple[int, str, str]:
    done = command("hpcgpt.train", str(home / "tiny.toml"), "--run.name", name, "--run.init_from", str(source), *flags)
    return done.returncode, done.stdout, done.stderr


def test_a_run_begins_with_those_weights_and_nothing_else_of_the_other_run(trained: Path) -> None:
    """A learning rate too small to change anything shows the first weights."""
    source = trained / "runs" / "first"
    tiny_rate = ("--train.steps", "1", "--optim.lr", "1e-30", "--schedule.warmup_steps", "0", "--schedule.min_lr", "0")
    # Options that do not change the shape of a weight may differ.
    status, out, err = start(trained, "second", source, *tiny_rate, "--run.seed", "7", "--model.dropout", "0.05")
    assert status == FINISHED, err
    assert f"first weights from {source / LAST}, step 12" in out
    before, after = tensors(source / LAST), tensors(trained / "runs" / "second" / "checkpoints" / "step_000000001")
    weights = {name for name in before if name.startswith("model/")}
    assert weights == {name for name in after if name.startswith("model/")}
    assert all(before[name] == after[name] for name in weights)
    (row,) = rows(trained / "runs" / "second" / "metrics.jsonl")
    assert (row["step"], row["samples"]) == (1, 8)
    assert row["train/loss"] < rows(source / "metrics.jsonl")[0]["train/loss"]
    assert all(before[name] != after[name] for name in before if name.endswith("/exp_avg"))


def test_a_run_with_a_checkpoint_does_not_need_the_other_run_any_more(trained: Path) -> None:
    source = trained / "runs" / "source"
    shutil.copytree(trained / "runs" / "first", source)
    (trained / "runs" / "third").mkdir()
    (trained / "runs" / "third" / "STOP").touch()
    assert start(trained, "third", source, "--train.steps", "4")[0] == 2  # a STOP file keeps it stopped
    (trained / "runs" / "third" / "STOP").unlink()
    assert start(trained, "third", source, "--train.steps", "5")[0] == FINISHED
    shutil.rmtree(source)
    status, out, err = start(trained, "third", source)
    assert status == FINISHED, err
    assert "resumed at step 5" in out
    assert "first weights" not in out
    found = [event["event"] for event in run_folder.events(trained / "runs" / "third")]
    assert found.count("init_from") == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.n_layer", "3"], "has another model: model.n_layer is 2 there and 3 here"),
        (["--model.tied", "false"], "has another model: model.tied is True there and False here"),
        (["--model.dropout", "0.1", "--model.block_size", "16"], "model.block_size is 32 there and 16 here"),
    ],
)
def test_another_model_is_refused_before_anything_starts(trained: Path, flags: list[str], expected: str) -> None:
    status, _, err = start(trained, "refused", trained / "runs" / "first", *flags)
    assert status == 2
    assert expected in err
    assert not (trained / "runs" / "refused").exists()


def test_a_source_that_is_no_run_or_has_no_checkpoint_or_tokenizer_of_its_own_is_refused(
    trained: Path, tmp_path: Path
) -> None:
    first = trained / "runs" / "first"
    assert "no run in" in start(trained, "refused", tmp_path)[2]
    empty = tmp_path / "empty"
    shutil.copytree(first, empty, ignore=shutil.ignore_patterns("step_*"))
    assert f"run.init_from {empty} has no checkpoint yet" in start(trained, "refused", empty)[2]
    assert (
        f"run.init_from {trained / 'runs' / 'new'} is this run itself"
        in start(trained, "new", trained / "runs" / "new")[2]
    )
    foreign = tmp_path / "foreign"
    shutil.copytree(first, foreign)
    shutil.rmtree(foreign / "tokenizer")
    save_load.save(find_tokenizer.find("gpt2", ""), foreign / "tokenizer")
    status, _, err = start(trained, "refused", foreign)
    assert status == 2
    assert "run.init_from: " in err
    assert "tokenizer gpt2 has fingerprint" in err


def test_a_damaged_checkpoint_of_the_source_is_skipped_and_only_damaged_ones_are_an_error(
    trained: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained / "runs" / "first", source)
    (source / LAST / "state.json").write_text("{}")
    status, out, err = start(trained, "fourth", source, "--train.steps", "1")
    assert status == FINISHED, err
    assert "is damaged" in err
    assert f"first weights from {source / 'checkpoints' / 'step_000000008'}" in out
    assert sorted(path.name for path in (source / "checkpoints").iterdir()) == sorted(
        path.name for path in (trained / "runs" / "first" / "checkpoints").iterdir()
    ), "checkpoints of another run are not set aside"
    for path in (source / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    status, _, err = start(trained, "fifth", source, "--train.steps", "1")
    assert status == 2
    assert "none is valid" in err
