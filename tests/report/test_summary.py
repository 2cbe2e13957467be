"""hpcgpt.report.summary: one sentence on what a run is, of what is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint.layout import State
from hpcgpt.report import facts, summary
from hpcgpt.run.goodput import Goodput
from tests.report.test_page import START, run_with

ABOUT = {"event": "about", "attempt": 1, "parameters": 940_000, "device": "cpu", "commit": "a" * 40, "dirty": True}
SETTINGS = '[model]\nkind = "modern"\nblock_size = 64\n[data]\ndir = "/home/me/data/shakespeare"\n'


def sentence(folder: Path) -> str:
    return summary.sentence(facts.read(folder, 2000.0, None))


def test_it_names_model_data_hardware_and_time(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", START, ABOUT, steps=5)
    (folder / "config.toml").write_text(SETTINGS)
    text = sentence(folder)
    assert text == (
        "A GPT (Qwen3's architecture) with 940k parameters and a context of 64 tokens, trained on data/shakespeare, "
        "by 2 processes (ranks) on CPUs, on 1970-01-01."
    )
    assert summary.code(facts.read(folder, 2000.0, None)) == "aaaaaaaaaaaa, with changes"


def test_the_processor_is_named_if_a_checkpoint_names_it(tmp_path: Path) -> None:
    run = facts.read(run_with(tmp_path / "run", START | {"world_size": 1}, ABOUT, steps=5), 2000.0, None)
    for recorded, words in (
        ({"cpu": "AMD EPYC", "run.threads": 4}, "by one process on a CPU (AMD EPYC, 4 threads)"),
        ({"cpu": ["one", "other"], "run.threads": 1}, "by one process on a CPU (1 thread)"),
        ({}, "by one process on a CPU"),
    ):
        run.state = State(1, 1, 1, 1, {}, in_effect=recorded)
        assert summary.sentence(run).startswith(f"A GPT with 940k parameters, {words}, on ")


def test_the_times_add_up_to_the_time_of_which_goodput_is_a_share() -> None:
    found = Goodput(300.0, 20.0, 30.0, 1.0, 15.0, 5.0, 60.0, 19.0, lost_steps=3, attempts=2, idle_s=40.0)
    assert summary.time_spent(found) == (
        "7.5 min in all: 5.0 min in steps that count, 30 s lost to failures and repeated steps, "
        "1.0 min for starting, evaluating, saving and the like, 1.0 min in the queue. "
        "Beside that, no job ran or was queued for 40 s."
    )
    assert summary.time_spent(dataclasses.replace(found, idle_s=0.0, lost_s=0.0, queue_s=0.0)) == (
        "6.0 min in all: 5.0 min in steps that count, 1.0 min for starting, evaluating, saving and the like."
    )


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"event": "about", "parameters": "many", "device": None, "commit": None}
    folder = run_with(tmp_path / "run", wrong)
    assert sentence(folder) == ""
    assert summary.code(facts.read(folder, 2000.0, None)) == ""
