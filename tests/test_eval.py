"""hpcgpt.eval and hpcgpt.sample: commands that use the checkpoints of a run."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import termios
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import eval as evaluation
from hpcgpt.eval import Progress
from hpcgpt.exit_codes import FINISHED
from hpcgpt.output import terminal
from tests.checkpoint.small_checkpoints import flip_byte, update_checksums
from tests.programs import ROOT, clean_env, command, on_ranks, program
from tests.tiny_run import TINY, rows

pytestmark = pytest.mark.processes

# The second run sets every option that changes what a model computes; the third uses bfloat16 and another kernel.
KINDS = {
    "gpt2": [],
    "modern": ["--model.kind", "modern", "--model.n_kv_head", "1", "--model.dropout", "0.1", "--data.document_mask",
               "true", "--train.loss_chunk", "24", "--train.activation_checkpointing", "true", "--optim.z_loss",
               "1e-3", "--train.dtype", "float32"],
    "rounded": ["--train.dtype", "bfloat16", "--train.attention", "math", "--sample.tokens", "30"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, evaluated on the whole split at step 12 (gpt2 also at 6), with checkpoints of 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.toml"
    path.write_text(f'{TINY}\n[data]\ndir = "{shards_folder}"\n')
    for name, flags in KINDS.items():
        arguments = ["--run.dir", str(folder), "--run.name", name, "--eval.batches", "0", "--checkpoint.every", "4",
                     "--eval.every", "6" if name == "gpt2" else "12"]  # fmt: skip
        done = command("hpcgpt.train", str(path), *arguments, *flags)
        assert done.returncode == FINISHED, done.stderr
        (folder / f"{name}.txt").write_bytes(done.stdout.encode())
    return folder


def evaluated(*arguments: str) -> dict[str, Any]:
    done = command("hpcgpt.eval", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert re.sub(r"[\d,]+ of [\d,]+ batches, \d+%\n", "", done.stderr) == ""  # where the machine is busy
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_the_newest_checkpoint_equal_those_of_training_bit_for_bit(kind: str, runs: Path) -> None:
    found, logged = evaluated(str(runs / kind)), rows(runs / kind / "metrics.jsonl")[-1]
    names = [name for name in logged if name.startswith("val/") and name != "val/elapsed_s"]
    assert {name: found[name] for name in names} == {name: logged[name] for name in names}
    assert len(names) == 3
    assert found["step"] == 12
    assert found["path"].endswith(f"{kind}/checkpoints/step_000000012")
    assert found["tokens"] % 32 == 0


def test_a_step_or_the_best_checkpoint_may_be_chosen(runs: Path) -> None:
    run = str(runs / "gpt2")
    named = evaluated(run, "--step", "4")
    assert named["step"] == 4
    assert named["val/loss"] > evaluated(run)["val/loss"]
    assert evaluated(run, "--best")["step"] == 12, "of the steps with a checkpoint only this one was evaluated"


def test_with_batches_the_same_part_of_the_split_is_used_as_in_training(runs: Path) -> None:
    part = evaluated(str(runs / "gpt2"), "--batches", "3")
    assert part["tokens"] == 3 * 4 * 32
    assert part["val/loss"] != evaluated(str(runs / "gpt2"))["val/loss"]


def test_figures_that_are_not_finite_are_null_in_json(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that has diverged. As in metrics.jsonl: JSON has no NaN."""
    figures = {"val/loss": math.nan, "val/perplexity": math.inf, "tokens": 32}
    monkeypatch.setattr(evaluation, "_figures", lambda *_: figures)
    assert evaluation.main([str(runs / "gpt2"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["val/loss"], found["val/perplexity"], found["tokens"]) == (None, None, 32)
    assert evaluation.main([str(runs / "gpt2")]) == 0
    assert "val/loss           nan" in capsys.readouterr().out


def test_without_json_the_output_is_readable(runs: Path) -> None:
    done = command("hpcgpt.eval", str(runs / "gpt2"))
    figures = evaluated(str(runs / "gpt2"))
    assert f"{figures['tokens']:,} tokens of validation" in done.stdout
    assert f"val/loss           {figures['val/loss']:.6f}\n" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--step", "5"], "has no checkpoint of step 5: there are 4, 8, 12"),
        (["--batches", "-1"], "--batches: -1 must be at least 0"),
        (["--step", "8", "--best"], "not allowed with argument"),
        (["--limit", "5"], "--limit has no effect without --tasks: leave it out"),
        (["--device", "cpu"], "--device has no effect without --tasks: leave it out"),
        (["--tasks", "README.md", "--batches", "2"], "--batches has no effect with --tasks: leave it out"),
        (["--tasks", "README.md", "--limit", "-1"], "--limit: -1 must be at least 1"),
        (["--tasks", "absent.jsonl"], "the task absent.jsonl cannot be read: No such file or directory"),
        (["--tasks", "README.md"], "README.md, line 1: not valid JSON"),
    ],
)
def test_impossible_arguments_are_refused(flags: list[str], sentence: str, runs: Path) -> None:
    done = command("hpcgpt.eval", str(runs / "gpt2"), *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_several_ranks_are_refused_without_tasks(runs: Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = command("hpcgpt.eval", str(runs / "gpt2"), env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert "2 ranks were started, and each would evaluate the whole validation split" in done.stderr


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    done = command("hpcgpt.eval", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no run in {tmp_path}" in done.stderr


@pytest.mark.parametrize("module", ["hpcgpt.eval", "hpcgpt.sample"])
def test_a_run_without_a_checkpoint_is_refused_with_a_hint(module: str, runs: Path, tmp_path: Path) -> None:
    """As `submit` leaves it while the job waits, and as it is before the first save."""
    for there in (["run.json"], ["run.json", "config.toml"]):
        for name in there:
            shutil.copy(runs / "gpt2" / name, tmp_path)
        done = command(module, str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        message = f"{tmp_path} has no checkpoint yet, so there is no model to look at: training writes one every"
        assert done.stderr.startswith(f"error: {message}")
        assert f"see `python -m hpcgpt.status {tmp_path}`" in done.stderr


def test_a_run_with_relative_paths_can_be_evaluated_from_any_folder(shards_folder: Path, tmp_path: Path) -> None:
    """Also a run of an earlier version, whose config.toml has the paths as they were written."""
    (tmp_path / "tiny.toml").write_text(TINY)
    shutil.copytree(shards_folder, tmp_path / "data" / "shards")
    done = command("hpcgpt.train", "tiny.toml", "--run.name", "r", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == FINISHED, done.stderr
    run = tmp_path / "runs" / "r"
    found = evaluated(str(run))
    kept = (run / "config.toml").read_text()
    assert f'dir = "{tmp_path}/data/shards"' in kept
    (run / "config.toml").write_text(kept.replace(f"{tmp_path}/", ""))
    assert evaluated(str(run)) | {"elapsed_s": 0} == found | {"elapsed_s": 0}
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    done = command("hpcgpt.eval", str(run))
    assert done.returncode == 2
    assert "no folder of shards at data/shards" in done.stderr
    assert "or set data.dir" in done.stderr
    moved = evaluated(str(run), "--data.dir", str(tmp_path / "elsewhere" / "shards"))
    assert moved["val/loss"] == found["val/loss"]


def test_an_evaluation_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4, every_s=0) as progress:
        assert [progress.next_batch() for _ in range(4)] == [False] * 4
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["0 of 4 batches, 0%", "1 of 4 batches, 25%", "2 of 4 batches, 50%", "3 of 4 batches, 75%"]


def test_on_a_terminal_an_evaluation_shows_a_bar(runs: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(leader, (24, 80))
    with open(follower, "wb") as err, open(tmp_path / "out", "wb") as out:
        arguments = [str(runs / "gpt2"), "--batches", "3"]
        status = program("hpcgpt.eval", arguments, clean_env(), ROOT, out, err).wait(120)
        screen = on_screen(leader)
    assert status == 0, screen
    assert "2/3" in screen, "two batches were done when the last one began"
    assert "val/loss" in (tmp_path / "out").read_text()


def on_screen(leader: int) -> str:
    """Return what a terminal has received so far."""
    os.set_blocking(leader, False)
    sent = b""
    with open(leader, "rb", buffering=0) as screen:
        while part := screen.read(1 << 16):
            sent += part
    return sent.decode()


def test_a_damaged_checkpoint_is_refused_if_named_and_otherwise_skipped(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "gpt2", tmp_path / "gpt2"))
    flip_byte(copy / "checkpoints/step_000000012")
    done = command("hpcgpt.eval", str(copy), "--step", "12")
    assert done.returncode == 2
    assert "step_000000012 is damaged: the checksum of" in done.stderr
    done = command("hpcgpt.eval", str(copy), "--best")
    assert done.returncode == 2
    assert "has no checkpoint of a step that was evaluated" in done.stderr
    done = command("hpcgpt.eval", str(copy), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["step"] == 8
    assert "warning: checkpoint" in done.stderr
    assert (copy / "checkpoints/step_000000012").is_dir(), "a command that only reads sets nothing aside"


def test_one_rank_chooses_the_checkpoint_for_all(runs: Path, tmp_path: Path) -> None:
    """A run that is training may have another best checkpoint a moment later."""
    copy = Path(shutil.copytree(runs / "gpt2", tmp_path / "gpt2"))
    flip_byte(copy / "checkpoints/step_000000012")
    (tmp_path / "task.jsonl").write_text('{"text": "a word"}\n')
    done = on_ranks(2, "hpcgpt.eval", str(copy), "--best", "--tasks", str(tmp_path / "task.jsonl"))
    assert done.returncode != 0
    assert done.stderr.count("warning: checkpoint") == 1, done.stderr


def test_evaluating_other_data_than_the_runs_is_refused(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "gpt2", tmp_path / "gpt2"))
    config = copy / "config.toml"
    config.write_text(config.read_text().replace("seed = 1", "seed = 2"))
    done = command("hpcgpt.eval", str(copy))
    assert done.returncode == 2
    assert "was trained with other data or settings: run.seed was 1 and is now 2" in done.stderr


# --- hpcgpt sample ---------------------------------------------------------------------------------


def sampled(*arguments: str) -> str:
    done = command("hpcgpt.sample", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.partition("\n")[2]  # after the line that names the checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_samples_made_at_once_equal_those_made_one_by_one(kind: str, runs: Path) -> None:
    flags = (str(runs / kind), "--prompt", "def ", "--tokens", "40")  # the context is 32
    first, second = (sampled(*flags, "--seed", seed) for seed in ("7", "8"))
    assert sampled(*flags, "--seed", "7", "--samples", "2") == first + second.replace("sample 1", "sample 2")
    assert first != second


@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_equals_that_of_training(kind: str, runs: Path) -> None:
    """Its seed is computed from the run's and the step."""
    output = (runs / f"{kind}.txt").read_bytes().decode()  # as text a carriage return would be read as a line's end
    made = output.partition("--- sample at step 12\n")[2].partition("\n---\n")[0]
    assert made
    assert terminal.shown(sampled(str(runs / kind), "--seed", "13")) == f"--- sample 1\n{made}\n"


def on_a_terminal(folder: Path, *arguments: str) -> str:
    """Return what `hpcgpt.sample` sends to a terminal."""
    leader, follower = pty.openpty()
    with open(follower, "wb") as out, open(folder / "err", "wb") as err:
        assert program("hpcgpt.sample", arguments, clean_env(), ROOT, out, err).wait(120) == 0
        return on_screen(leader)


def test_control_characters_of_a_text_are_escaped_on_a_terminal_and_not_in_a_pipe(runs: Path, tmp_path: Path) -> None:
    flags = (str(runs / "gpt2"), "--prompt", "\x1b[2J\u202edef ", "--tokens", "30", "--temperature", "3")
    shown, piped = on_a_terminal(tmp_path, *flags), command("hpcgpt.sample", *flags).stdout
    assert "\n\x1b[2J\u202edef " in piped
    assert "\n\\x1b[2J\\u202edef " in shown
    assert shown.replace("\r\n", "\n") == terminal.shown(piped)


def test_control_characters_of_a_sample_are_escaped_in_the_log(runs: Path, tmp_path: Path) -> None:
    done = command("hpcgpt.train", str(runs / "tiny.toml"), "--run.dir", str(tmp_path), "--sample.prompt", "\x1b[2J")
    assert done.returncode == FINISHED, done.stderr
    assert "--- sample at step 12\n\\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_sample_continues_its_prompt_and_may_be_of_an_earlier_step(runs: Path) -> None:
    flags = (str(runs / "gpt2"), "--prompt", "def ", "--tokens", "20", "--temperature", "0")
    assert sampled(*flags).startswith("--- sample 1\ndef ")
    assert sampled(*flags, "--step", "12") == sampled(*flags)
    assert command("hpcgpt.sample", *flags, "--step", "4").stdout.splitlines()[0].endswith("step_000000004, step 4")


def test_without_a_prompt_a_sample_is_a_document_from_its_beginning(runs: Path) -> None:
    flags = ("--tokens", "20", "--temperature", "0", "--prompt", "")
    assert len(sampled(str(runs / "gpt2"), *flags).removeprefix("--- sample 1\n")) >= 20


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--slide", "33"], "--slide: 33 is more than the run's block_size of 32"),
        (["--slide", "0"], "--slide: 0 must be at least 1"),
        (["--samples", "0"], "--samples: 0 must be at least 1"),
        (["--seed", "99999999999999999999"], "--seed: 99999999999999999999 must be from -9223372036854775808 to"),
        (["--step", "7"], "has no checkpoint of step 7: there are 4, 8, 12"),
    ],
)
def test_impossible_samples_are_refused(flags: list[str], sentence: str, runs: Path) -> None:
    done = command("hpcgpt.sample", str(runs / "gpt2"), *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr


# --- runs of earlier versions ----------------------------------------------------------------------


def test_a_run_from_before_these_options_is_continued(runs: Path, tmp_path: Path) -> None:
    """Its checkpoints lack both options, whose defaults mean what the version did then."""
    shutil.copytree(runs / "gpt2", tmp_path / "gpt2")
    forget(tmp_path / "gpt2/checkpoints/step_000000012", "model.n_kv_head", "data.document_mask")
    config = str(tmp_path / "gpt2/config.toml")
    done = command("hpcgpt.train", config, "--run.dir", str(tmp_path))
    assert done.returncode == FINISHED, done.stderr
    assert "finished already, at step 12" in done.stdout
    done = command("hpcgpt.train", config, "--run.dir", str(tmp_path), "--data.document_mask", "true")
    assert done.returncode == 2
    assert "data.document_mask was False and is now True" in done.stderr


def forget(checkpoint: Path, *keys: str) -> None:
    """Remove keys from a checkpoint's identity."""
    state = json.loads((checkpoint / "state.json").read_bytes())
    for key in keys:
        del state["identity"][key]
    (checkpoint / "state.json").write_text(json.dumps(state))
    update_checksums(checkpoint)
