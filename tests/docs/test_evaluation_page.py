"""docs/evaluation.md: its commands are run, and its tables have what the code has."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import get_args

import pytest

from hpcgpt.config import sources
from hpcgpt.lm_eval import __main__ as lm_eval_command
from hpcgpt.tasks import questions, report, scores
from tests.programs import ROOT, command, on_ranks
from tests.tasks import made_questions

PAGE = (ROOT / "docs/evaluation.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
# The form of each file that the page names.
FILES = {"hellaswag_val.jsonl": "hellaswag", "arc_easy_test.jsonl": "arc", "lambada_test.jsonl": "lambada"}


@pytest.fixture
def here(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's run and files."""
    shutil.copytree(finished_run, tmp_path / "runs/gpt2-124m")
    made = dict(zip(made_questions.FORMS, made_questions.write(tmp_path, 8), strict=True))
    for name, form in FILES.items():
        made[form].rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.processes
def test_the_commands(here: Path) -> None:
    alone, on_two, train, install, harness = COMMANDS
    done = command("hpcgpt.eval", *alone[2:], cwd=here)
    assert done.returncode == 0, done.stderr
    for name, form in FILES.items():
        assert f"{name}: 8 questions, form {form}\n" in done.stderr
        assert f"{Path(name).stem} " in done.stdout
    assert on_two[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "hpcgpt.eval"]
    arguments = [str(here / part) if (here / part).exists() else part for part in on_two[5:]]
    done = on_ranks(2, "hpcgpt.eval", *arguments)
    assert done.returncode == 0, done.stderr
    assert '"questions": 8' in done.stdout
    settings = sources.from_command_line(train[2:], "train", "")
    assert (settings.eval.tasks, settings.eval.tasks_every) == (("hellaswag_val.jsonl", "lambada_test.jsonl"), 1000)
    assert install == ["pip", "install", "hpcgpt[lm-eval]"]
    # tests/lm_eval/test_agreement.py runs one like it.
    assert " ".join(harness) == lm_eval_command.EXAMPLE


def test_the_tables_list_every_form_and_every_figure() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == {
        *get_args(questions.Form),
        *report.FIGURES,
        "chance",
    }
    assert all(f"    {name} " in (scores.__doc__ or "") for name in (*report.FIGURES, "chance"))
