"""hpcgpt.report.summary: one sentence on what a run is, of what is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcgpt.report import facts, summary
from tests.report.test_page import START, run_with

ABOUT = {"event": "about", "attempt": 1, "parameters": 940_000, "device": "cpu", "commit": "a" * 40, "dirty": True}
SETTINGS = '[model]\nkind = "modern"\nblock_size = 64\n[data]\ndir = "/home/me/data/shakespeare"\n'


def sentence(folder: Path) -> str:
    return summary.sentence(facts.read(folder, 2000.0, None))


def test_it_names_model_data_hardware_and_time(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", START, ABOUT, steps=5)
    (folder / "config.toml").write_text(SETTINGS)
    text = sentence(folder)
    begin = "A GPT (modern kind) with 940k parameters and a context of 64 tokens, trained on data/shakespeare, by 2 "
    assert text.startswith(begin)
    assert "by 2 processes (ranks) on CPUs, on 1970-01-01: " in text
    assert text.endswith("with a job queued or running.")
    assert summary.code(facts.read(folder, 2000.0, None)) == "aaaaaaaaaaaa, with changes"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"event": "about", "parameters": "many", "device": None, "commit": None}
    folder = run_with(tmp_path / "run", wrong)
    assert sentence(folder) == ""
    assert summary.code(facts.read(folder, 2000.0, None)) == ""
