"""hpcgpt.checkpoint.init_from: a run that begins with the weights of another run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from hpcgpt import plan
from hpcgpt.checkpoint import layout
from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from hpcgpt.tokenizer import find_tokenizer, save_load
from tests.programs import command, on_ranks
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
    # A name means another folder now, that of this run, if it were looked for.
    status, out, err = start(trained, "third", "source")
    assert status == FINISHED, err
    assert sources.from_file(trained / "runs" / "third" / "config.toml").run.init_from == str(source)
    assert "resumed at step 5" in out
    assert "first weights" not in out
    assert f"run.init_from {source} is not read: this run has checkpoints of its own" in out
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
    # A folder of runs, or a pattern, would mean something else once this run's folder is there.
    assert "no run in" in start(trained, "refused", trained / "runs")[2]
    assert "no run in" in start(trained, "refused", "fir*")[2]
    empty = tmp_path / "empty"
    shutil.copytree(first, empty, ignore=shutil.ignore_patterns("step_*"))
    assert f"run.init_from {empty} has no checkpoint yet" in start(trained, "refused", empty)[2]
    run_folder.prepare(trained / "runs" / "new")  # as the batch script does
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


# --- forks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def constant(trained: Path) -> Path:
    """A run of 12 steps at a constant rate, from which forks can compute the same once more."""
    done = command("hpcgpt.train", str(trained / "tiny.toml"), "--run.name", "constant", *CONSTANT)
    assert done.returncode == FINISHED, done.stderr
    return trained / "runs" / "constant"


CONSTANT = ("--schedule.kind", "constant", "--schedule.warmup_steps", "0")
FORK = ("--run.init_step", "4", "--run.init_optimizer", "true", "--run.init_data", "continue")


def test_a_fork_with_optimizer_and_samples_computes_what_the_other_run_did(trained: Path, constant: Path) -> None:
    status, out, err = start(trained, "fork", constant, *CONSTANT, *FORK, "--train.steps", "8")
    assert status == FINISHED, err
    source = constant / "checkpoints" / "step_000000004"
    assert f"first weights from {source}, step 4, with its optimizer; samples from 32 on" in out
    there, here = tensors(constant / LAST), tensors(trained / "runs" / "fork" / "checkpoints" / "step_000000008")
    same = {name for name in there if not name.startswith("rng/")}
    assert all(there[name] == here[name] for name in same)
    losses = [[row["train/loss"] for row in rows(run / "metrics.jsonl")] for run in (constant, trained / "runs/fork")]
    assert losses[0][4:] == losses[1]
    # An interrupted fork continues as itself.
    assert "first weights" not in start(trained, "fork", constant, *CONSTANT, *FORK, "--train.steps", "10")[1]


def test_a_fork_that_was_killed_before_its_first_checkpoint_begins_with_the_same_weights(
    trained: Path, tmp_path: Path
) -> None:
    """Though the other run trains on meanwhile, and has a newer checkpoint."""
    source, fork, later = tmp_path / "source", trained / "runs" / "killed", tmp_path / "later"
    shutil.copytree(trained / "runs" / "first", source)
    (source / LAST).rename(later)
    flags = ("--train.steps", "2", "--checkpoint.keep_last", "1")
    status, out, err = start(trained, "killed", source, *flags)
    assert status == FINISHED, err
    assert "step_000000008, step 8" in out
    before = tensors(fork / "checkpoints" / "step_000000002")
    shutil.rmtree(fork / "checkpoints")  # as if it was killed before
    later.rename(source / LAST)
    status, out, err = start(trained, "killed", source, *flags)
    assert status == FINISHED, err
    assert "step_000000008, step 8" in out
    assert tensors(fork / "checkpoints" / "step_000000002") == before
    (event, again) = [event for event in run_folder.events(fork) if event["event"] == "init_from"]
    assert event["from_step"] == again["from_step"] == 8
    assert sources.from_file(fork / "config.toml").run.init_step == 0  # as it was given
    shutil.rmtree(fork / "checkpoints")
    shutil.rmtree(source / "checkpoints" / "step_000000008")
    rows, events = (fork / "metrics.jsonl").read_bytes(), (fork / "events.jsonl").read_text()
    first = "".join(events.splitlines(keepends=True)[: events[: events.index('"init_from"')].count("\n") + 1])
    (fork / "metrics.jsonl").write_bytes(b"")
    (fork / "events.jsonl").write_text(first)  # as if no attempt had made a step: nothing depends on that checkpoint
    status, out, err = start(trained, "killed", source, *flags, "--dry-run")
    assert "the newest checkpoint" in out, err
    # As if the second one had been ended before its first step, which cuts off the rows of the first.
    (fork / "events.jsonl").write_text(events)
    status, out, err = start(trained, "killed", source, *flags, "--dry-run")
    assert status == 2, out
    (fork / "metrics.jsonl").write_bytes(rows)
    status, out, err = start(trained, "killed", source, *flags)
    assert status == 2
    assert "this run began with its checkpoint of step 8" in err
    assert "that one is gone, there are those of steps 4, 12" in err
    status, out, err = start(trained, "killed", source, *flags, "--run.init_step", "12")
    assert status == FINISHED, err
    assert "step_000000012, step 12" in out
    assert tensors(fork / "checkpoints" / "step_000000002") != before


@pytest.mark.parametrize("left_out", ["--run.init_optimizer", "--run.init_data"])
def test_without_one_of_them_it_does_not(left_out: str, trained: Path, constant: Path) -> None:
    flags = [*FORK, "--train.steps", "1"]
    del flags[flags.index(left_out) : flags.index(left_out) + 2]
    name = left_out.replace("--run.", "without_")
    status, _, err = start(trained, name, constant, *CONSTANT, *flags)
    assert status == FINISHED, err
    there, here = (
        tensors(run / "checkpoints" / step)
        for run, step in ((constant, "step_000000008"), (trained / "runs" / name, "step_000000001"))
    )
    assert there.keys() == here.keys()
    (row,) = rows(trained / "runs" / name / "metrics.jsonl")
    loss = rows(constant / "metrics.jsonl")[4]["train/loss"]
    assert (row["train/loss"] == loss) == (left_out == "--run.init_optimizer")  # the first loss needs no optimizer


def test_a_fork_on_two_ranks_with_another_batch_continues_after_the_samples_that_were_used(
    trained: Path, constant: Path
) -> None:
    """4 steps of 8 samples are 2.67 of 12: the new run begins with its batch 3."""
    done = on_ranks(
        2, "hpcgpt.train", str(trained / "tiny.toml"), "--run.name", "wider", "--run.init_from", str(constant), *FORK,
        "--train.global_batch", "12", "--train.micro_batch", "2", "--train.steps", "2",
    )  # fmt: skip
    assert done.returncode == FINISHED, done.stderr
    assert "samples from 36 on" in done.stdout
    state = layout.read_state(trained / "runs" / "wider" / "checkpoints" / "step_000000002")
    assert (state.step, state.skipped, state.rollbacks) == (2, 3, 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--run.init_step", "5"], "run.init_step 5: "),
        (["--run.init_step", "5"], "no checkpoint of step 5, but those of steps 4, 8, 12"),
        (["--run.init_optimizer", "true", "--optim.name", "muon"], "optim.name is adamw in"),
        (["--run.init_data", "continue", "--run.seed", "7"], "whose run.seed is 1 and here is 7"),
        (["--run.init_data", "continue", "--data.stride", "8"], "whose data.stride is 32 and here is 8"),
    ],
)
def test_what_cannot_be_forked_is_refused_with_the_way_out(
    trained: Path, constant: Path, flags: list[str], expected: str
) -> None:
    settings = sources.from_command_line(
        [str(trained / "tiny.toml"), "--run.name", "no", "--run.init_from", str(constant), *flags], "train", ""
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        plan.make(settings, 1)
