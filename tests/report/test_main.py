"""hpcgpt.report: the command."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.report.__main__ import main
from tests.report.page_reader import Page
from tests.report.test_page import START, run_with


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        run_with(tmp_path / "runs" / name, START, steps=30)
    return tmp_path / "runs"


def test_a_page_is_written_and_replaced(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["one"]) == 0
        assert capsys.readouterr().out.startswith("report.html: 1 run, ")
    assert "one" in Page((tmp_path / "report.html").read_text()).text
    assert main([str(runs), "-o", "both.html"]) == 0
    assert "2 runs" in Page((tmp_path / "both.html").read_text()).text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.html", "report.html", "runs"]


def test_a_page_may_go_to_standard_output(runs: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main([str(runs / "one"), "-o", "-"]) == 0
    assert "one" in Page(capfdbinary.readouterr().out.decode()).text


def test_nothing_is_written_into_a_run_folder(runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert main(["one", "two", "-o", "page.html"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["three"], "no run in three, nor a run of that name below runs"),
        (["one", "-o", "runs"], "-o runs is a folder: name a file in it, such as runs/report.html"),
        (["one", "-o", "none/page.html"], "-o none/page.html: there is no folder none"),
        (["one", "-o", "thesis.html"], "-o thesis.html: this file exists and is no report of hpcgpt"),
        (["one", "-o", "pipe"], "-o pipe exists and is no regular file"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], sentence: str, runs: Path) -> None:
    thesis = runs.parent / "thesis.html"
    mine = "<!DOCTYPE html>\n<p>my thesis, with a page of hpcgpt report"
    thesis.write_text(mine)
    os.mkfifo(runs.parent / "pipe")
    with pytest.raises(UserError, match=sentence):
        main(arguments)
    assert thesis.read_text() == mine


def test_a_run_that_cannot_be_read_is_named(runs: Path, tmp_path: Path) -> None:
    (runs / "two" / "run.json").write_text("{")
    assert main(["one", "two", "-o", "page.html"]) == 0
    text = Page((tmp_path / "page.html").read_text()).text
    assert "Not readable:" in text
    assert "run.json is damaged" in text
    with pytest.raises(UserError, match="is damaged"):
        main(["two"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read what it may not write")
def test_a_run_of_another_user_can_be_shown(runs: Path) -> None:
    for path in [runs / "one", *(runs / "one").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert main(["one"]) == 0
