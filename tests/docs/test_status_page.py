"""docs/status.md: its commands can be run, it names every state, and its picture is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import get_args

import pytest

from hpcgpt.status import run_state, run_status
from tests.programs import ROOT, command
from tests.status.made_runs import NOW, run_folder

PAGE = (ROOT / "docs/status.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
START = {"attempt": 1, "job": "7_0", "step": 0, "total_steps": 9, "world_size": 1, "hosts": ["n1"]}
FINISHED = {"attempt": 1, "status": 0, "reason": "finished", "step": 9}
COMMANDS = [line.partition("|")[0] for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
            for line in block.splitlines()]  # fmt: skip


def test_every_state_is_explained() -> None:
    (table,) = re.findall(r"## States\n(.*?)\n## ", PAGE, flags=re.DOTALL)
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(get_args(run_state.Name))


def test_every_key_of_json_is_in_the_reference(tmp_path: Path) -> None:
    (section,) = re.findall(r"\n## `hpcgpt status --json`\n(.*?)\n## ", REFERENCE, flags=re.DOTALL)
    found = run_status.complete(run_folder(tmp_path, (9, "start", START), steps=3), NOW, None, with_history=True)
    named = set(re.findall(r"`([\w/]+)`", section))
    keys = {*found, *found["history"][0]} - {"world_size", "job"}
    assert keys - named - {"running"} == set()


def test_the_page_shows_commands() -> None:
    assert len(COMMANDS) > 3


@pytest.mark.processes
@pytest.mark.parametrize("line", [line for line in COMMANDS if "/scratch" not in line])
def test_each_command_runs(tmp_path: Path, line: str) -> None:
    for name in ("gpt2-124m", "sweep-1"):
        run_folder(tmp_path / "runs", (9, "start", START), (1, "end", FINISHED), steps=9, held=False, name=name)
    _python, _m, module, *arguments = shlex.split(line, comments=True)
    done = command(module, *arguments, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished" in done.stdout


def test_the_picture_is_of_a_terminal_of_80_columns_or_more() -> None:
    picture = (ROOT / "docs/watch.svg").read_text(encoding="utf-8")
    assert "tokens/s" in picture
    assert "q: quit" in picture
    assert picture.count("<circle") > 100
