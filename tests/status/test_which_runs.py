"""hpcgpt.status.which_runs: folders, names, patterns and folders of runs, newest first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.status.which_runs import find
from tests.disks import another_user
from tests.disks import shared as shared  # fixture


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs and a sweep of two below runs/, the working directory; `old` changed first."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["sweep/b", "sweep/a", "gpt2-new", "gpt2-mid", "old"]):
        folder = tmp_path / "runs" / name
        run_folder.prepare(folder)
        (folder / "events.jsonl").touch()
        for path in ("run.json", "events.jsonl"):
            os.utime(folder / path, (10_000 - age, 10_000 - age))
    (tmp_path / "runs/no-run").mkdir()
    (tmp_path / "runs/a-file").touch()
    return tmp_path


RUNS = Path("runs")


def names(*arguments: str) -> list[str]:
    return [str(folder) for folder in find(arguments, RUNS)]


def test_without_arguments_all_runs_are_found_newest_first(here: Path) -> None:
    assert names() == ["runs/sweep/b", "runs/sweep/a", "runs/gpt2-new", "runs/gpt2-mid", "runs/old"]
    (here / "runs/old/metrics.jsonl").write_text("{}\n")
    assert names()[0] == "runs/old"


@pytest.mark.usefixtures("here")
def test_folders_names_patterns_and_folders_of_runs() -> None:
    assert names("runs/old") == ["runs/old"]
    assert names("old") == ["runs/old"]
    assert names("sweep/a") == ["runs/sweep/a"]
    assert names("runs") == names()
    assert names("runs/sweep") == names("sweep") == ["runs/sweep/b", "runs/sweep/a"]
    assert names("gpt2-*") == ["runs/gpt2-new", "runs/gpt2-mid"]
    assert names("runs/gpt2-*") == ["runs/gpt2-new", "runs/gpt2-mid"]
    assert names("runs/s*") == ["runs/sweep/b", "runs/sweep/a"]
    assert names("old", "runs/old", "gpt2-new") == ["runs/gpt2-new", "runs/old"]
    assert names("sweep/?") == ["runs/sweep/b", "runs/sweep/a"]


def test_a_run_is_not_searched_for_runs(here: Path) -> None:
    run_folder.prepare(here / "runs/old/checkpoints/not-a-run")
    assert "runs/old" in names()
    assert not any("not-a-run" in name for name in names())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gpt2-nev", r"no run in gpt2-nev, nor a run of that name below runs \(did you mean gpt2-new\?\)"),
        ("runs/no-run", "no run in runs/no-run: there is no run.json"),
        ("x*", "no run matches 'x\\*', neither here nor below runs"),
        ("runs/a-file", "no run in runs/a-file"),
        ("\x1b31m", r"no run in \\x1b31m"),
    ],
)
def test_a_name_without_a_run_is_a_user_error(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find([argument], RUNS)


def test_no_runs_at_all_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs below runs, here in "):
        find([], RUNS)


def test_a_folder_that_may_not_be_looked_into_is_found_so_that_its_error_is_shown(shared: Path) -> None:
    run_folder.prepare(shared / "open")
    run_folder.prepare(shared / "closed")
    (shared / "closed").chmod(0o700)
    (shared / "open").chmod(0o755)
    with another_user():
        assert {folder.name for folder in find([str(shared)], RUNS)} == {"open", "closed"}
