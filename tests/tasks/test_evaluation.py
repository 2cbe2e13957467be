"""hpcgpt.tasks.evaluation: `hpcgpt eval --tasks` on any number of ranks, and tasks while training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import train
from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED, USER_MISTAKE
from hpcgpt.tasks import questions, report
from tests.programs import ROOT, command, on_ranks
from tests.tasks import made_questions
from tests.tiny_run import curve, rows, tensors

pytestmark = pytest.mark.processes

COUNT = 60
FIGURES = {"accuracy", "accuracy_norm", "accuracy_bytes", "bits_per_byte"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A task of each form."""
    return [str(path) for path in made_questions.write(tmp_path_factory.mktemp("tasks"), COUNT)]


def evaluated(run: Path, *arguments: str, ranks: int = 1) -> str:
    flags = [str(run), *arguments, "--json"]
    done = on_ranks(ranks, "hpcgpt.eval", *flags) if ranks > 1 else command("hpcgpt.eval", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(finished_run: Path, files: list[str]) -> str:
    return evaluated(finished_run, "--tasks", *files)


def test_the_report_has_every_figure_of_every_task(alone: str, files: list[str], finished_run: Path) -> None:
    found = json.loads(alone)
    assert (found["path"], found["step"]) == (str(finished_run / "checkpoints/step_000000012"), 12)
    assert list(found["tasks"]) == list(made_questions.FORMS)
    for path, (name, task) in zip(files, found["tasks"].items(), strict=True):
        expected = questions.read(Path(path))
        assert (task["file"], task["sha256"], task["form"]) == (path, expected.sha256, name)
        assert task["questions"] == COUNT
        assert 0 < task["truncated"] < COUNT, "the context of the run is 32 tokens"
        figures = {"accuracy", "perplexity", "bits_per_byte"} if name == "lambada" else FIGURES
        assert all(task[figure] >= 0 and task[f"{figure}_stderr"] >= 0 for figure in figures)
        assert (task.get("chance") == 0.25) == (name != "lambada")
    assert found["tasks"]["endings"]["bits_per_byte"] < 8, "a uniform guess over 512 ids is 9 bits a token"


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_prints_the_same_bytes(
    ranks: int, alone: str, finished_run: Path, files: list[str]
) -> None:
    assert evaluated(finished_run, "--tasks", *files, ranks=ranks) == alone


def test_ranks_with_an_error_end_with_its_status_although_gloo_would_abort_their_finalization(
    finished_run: Path, files: list[str]
) -> None:
    flags = [str(finished_run), "--tasks", *files, "--step", "5"]
    done = on_ranks(2, "tests.ranks_aborting", "hpcgpt.eval", *flags)
    assert done.returncode == USER_MISTAKE, done.stderr
    assert "no checkpoint of step 5" in done.stderr


def test_a_limit_takes_the_first_questions_and_a_batch_changes_only_rounding(
    finished_run: Path, files: list[str], tmp_path: Path
) -> None:
    first = tmp_path / "endings.jsonl"
    first.write_text("".join(Path(files[0]).read_text(encoding="utf-8").splitlines(keepends=True)[:7]))
    limited, cut = (
        json.loads(evaluated(finished_run, "--tasks", *more))["tasks"]["endings"]
        for more in ([files[0], "--limit", "7"], [str(first)])
    )
    assert limited["questions"] == 7
    assert {key: value for key, value in limited.items() if key not in ("file", "sha256")} == {
        key: value for key, value in cut.items() if key not in ("file", "sha256")
    }
    # In bfloat16, which some CPUs compute in, a likelihood depends on the batch that a text is in.
    exact = shutil.copytree(finished_run, tmp_path / "exact")
    settings = exact / "config.toml"
    settings.write_text(settings.read_text().replace('dtype = "auto"', 'dtype = "float32"'))
    small, large = (
        json.loads(evaluated(exact, "--tasks", *files, *more))
        for more in ([], ["--batch", "50", "--device", "cpu", "--step", "12"])
    )
    for name, task in small["tasks"].items():
        assert {key: value for key, value in large["tasks"][name].items() if type(value) is float} == pytest.approx(
            {key: value for key, value in task.items() if type(value) is float}, rel=1e-5
        )


def test_without_json_there_is_a_table_and_the_forms_are_named(finished_run: Path, files: list[str]) -> None:
    done = command("hpcgpt.eval", str(finished_run), "--tasks", files[0], files[3], "--limit", "20")
    assert done.returncode == 0, done.stderr
    found = json.loads(evaluated(finished_run, "--tasks", files[0], files[3], "--limit", "20"))
    assert done.stdout == f"{report.as_text(found)}\n"
    task = found["tasks"]["endings"]
    line = f"endings  questions              20\n         accuracy           {task['accuracy']:.4f} +/- "
    assert line in done.stdout
    assert f"endings: the context of {task['truncated']} of 20 questions was cut off on the left\n" in done.stdout
    assert f"{files[0]}: 20 questions, form endings\n{files[3]}: 20 questions, form lambada\n" in done.stderr


def test_a_figure_that_is_not_finite_is_shown_as_such() -> None:
    task: dict[str, Any] = {"questions": 1, "truncated": 0, "accuracy": 0.0, "accuracy_stderr": None}
    shown = report.as_text({"path": "a", "step": 1, "dtype": "float32", "tasks": {"t": task | {
        "perplexity": None, "perplexity_stderr": None}}})  # fmt: skip
    assert "perplexity     not finite\n" in f"{shown}\n"
    assert "accuracy           0.0000\n" in shown, "one question has no standard error"


# --- while training --------------------------------------------------------------------------------


def trained(config: Path, folder: Path, *flags: str, ranks: int = 1) -> Path:
    arguments = [str(config), "--run.dir", str(folder), *flags]
    done = on_ranks(ranks, "hpcgpt.train", *arguments) if ranks > 1 else command("hpcgpt.train", *arguments)
    assert done.returncode == FINISHED, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder / "tiny"


def of_tasks(run: Path) -> dict[int, dict[str, Any]]:
    """Return the figures of tasks in metrics.jsonl, by step."""
    found = {
        row["step"]: {key: value for key, value in row.items() if key.startswith("eval/")}
        for row in rows(run / "metrics.jsonl")
    }
    return {step: figures for step, figures in found.items() if figures}


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_tasks_are_evaluated_while_training_and_change_no_weight(
    mode: str, config: Path, finished_run: Path, files: list[str], alone: str, tmp_path: Path
) -> None:
    """On 1 rank, or on 2 with sharded weights: the figures of `hpcgpt eval` on the same checkpoint, and no others."""
    flags = ["--eval.tasks", f"{files[0]},{files[3]}", "--eval.tasks_every", "6", "--checkpoint.every", "6"]
    if mode == "ddp":
        run, plain = trained(config, tmp_path, *flags), finished_run
    else:
        # In bfloat16 fsdp rounds the gains of norms, and `hpcgpt eval` on one rank does not.
        sharded = ["--parallel.mode", "fsdp", "--train.dtype", "float32"]
        run = trained(config, tmp_path, *flags, *sharded, ranks=2)
        plain = trained(config, tmp_path / "plain", *sharded, ranks=2)
    assert tensors(run / "checkpoints/step_000000012") == tensors(plain / "checkpoints/step_000000012")
    assert curve(run) == curve(plain)
    found = of_tasks(run)
    assert list(found) == [6, 12]
    task = json.loads(evaluated(run, "--tasks", files[0], files[3]))["tasks"]
    expected = {
        f"eval/{name}/{key}": value
        for name, entry in task.items()
        for key, value in entry.items()
        if key not in ("file", "sha256", "form", "questions", "truncated")
    }
    assert found[12] == expected
    assert found[6] != expected
    if mode == "ddp":
        assert task == {name: json.loads(alone)["tasks"][name] for name in ("endings", "lambada")}
    accuracy = f"endings accuracy {expected['eval/endings/accuracy']:.4f}, lambada accuracy"
    assert accuracy in (tmp_path / "stdout").read_text()


def test_the_last_step_is_evaluated_too_and_others_are_not(config: Path, files: list[str], tmp_path: Path) -> None:
    """With the list of files in TOML, and wandb, which shows the figures as curves and as the run's last values.

    The run stops if a file is gone, and does not continue without it.
    """
    text = config.read_text().replace("every = 6", 'every = 4\ntasks = ["task.jsonl"]\ntasks_every = 8')
    (tmp_path / "my.toml").write_text(text.replace("steps = 12", "steps = 10"))
    shutil.copy(files[0], tmp_path / "task.jsonl")
    flags = [str(tmp_path / "my.toml"), "--run.dir", str(tmp_path)]
    offline = ["--tracking.wandb", "offline"]
    done = command("hpcgpt.train", *flags, *offline, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == FINISHED, done.stderr
    found = of_tasks(tmp_path / "tiny")
    assert list(found) == [8, 10]
    (tracked,) = (tmp_path / "tiny/wandb").glob("offline-run-*/*.wandb")
    records = [
        json.loads(line) for line in command("wandb", "leet", "inspect", "--json", str(tracked)).stdout.splitlines()
    ]
    curves = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert {item["step"]: item for item in curves if "eval/task/accuracy" in item}.keys() == {8, 10}
    shown: dict[str, Any] = {}
    for record in records:
        shown |= record["summary"]["update"] if record["type"] == "summary" else {}
    assert found[10].items() <= shown.items()
    kept = sources.from_file(tmp_path / "tiny" / "config.toml")
    assert kept.eval.tasks == (str(tmp_path / "task.jsonl"),), "an absolute path, wherever it is read"
    (tmp_path / "task.jsonl").unlink()
    with pytest.raises(UserError, match=r"the task task.jsonl cannot be read: No such file"):
        train.main([*flags, "--train.steps", "18", "--dry-run"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--eval.tasks", "{0}"], "eval.tasks has no effect without eval.tasks_every: give both"),
        (["--eval.tasks_every", "6"], "eval.tasks_every has no effect without eval.tasks: give both"),
        (["--eval.tasks", "{0}", "--eval.tasks_every", "9"], "eval.tasks_every 9 must be a multiple of eval.every 6"),
        (["--eval.tasks", "{0},absent.jsonl", "--eval.tasks_every", "6"], "the task absent.jsonl cannot be read"),
        (["--eval.tasks", "{0},,", "--eval.tasks_every", "6"], "eval.tasks: expected a list of files"),
        (["--eval.tasks", "{0}", "--eval.tasks_every", "6", "--model.block_size", "4"], "and the model's context is 4"),
    ],
)
def test_tasks_that_cannot_be_evaluated_are_refused_before_training(
    flags: list[str], sentence: str, config: Path, files: list[str], tmp_path: Path
) -> None:
    filled = [flag.replace("{0}", files[0]) for flag in flags]
    with pytest.raises(UserError, match=sentence):
        train.main([str(config), "--run.dir", str(tmp_path), *filled, "--dry-run"])
