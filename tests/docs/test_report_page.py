"""docs/report.md: its commands can be run, and its pictures are there and small."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from hpcgpt import sample
from hpcgpt.report import __main__ as report
from tests.programs import ROOT

PAGE = (ROOT / "docs/report.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True) for block in re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
            for line in block.splitlines()]  # fmt: skip
PICTURES = [f"report_{width}_{theme}.png" for width in ("wide", "phone") for theme in ("light", "dark")]


@pytest.mark.processes
def test_each_command_runs(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gpt2-124m", "gpt2-small"):
        shutil.copytree(finished_run, tmp_path / "runs" / name)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb"}\n')
    monkeypatch.chdir(tmp_path)
    assert [command[1] for command in COMMANDS] == ["report"] * 3 + ["sample"] * 4
    for _, name, *arguments in COMMANDS:
        if "<" in arguments:  # tests/test_sample.py reads standard input
            assert arguments[-2:] == ["<", "prompts.txt"]
            continue
        assert {"report": report.main, "sample": sample.main}[name](arguments) == 0
    out = capsys.readouterr().out
    assert [f"{page}.html: {number} run" in out for page, number in (("report", 1), ("both", 2), ("all", 2))] == [
        True
    ] * 3
    assert "--- prompt 1, sample 2\na\nb" in out


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_are_shown_and_small(name: str) -> None:
    content = (ROOT / "docs" / name).read_bytes()
    assert f"({name})" in PAGE
    assert content.startswith(b"\x89PNG")
    assert len(content) < 150_000
    assert int.from_bytes(content[16:20]) == (1200 if "wide" in name else 390)
