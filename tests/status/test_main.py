"""hpcgpt.status.__main__: the command line, and which form is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.status.__main__ import _parse, main
from tests.status.made_runs import run_folder

START = {"attempt": 1, "job": "", "step": 0, "total_steps": 9, "world_size": 1, "hosts": ["n1"]}
FINISHED = {"attempt": 1, "status": 0, "reason": "finished", "step": 9}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        run_folder(tmp_path, (9, "start", START), (1, "end", FINISHED), steps=9, held=False, name=name)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "watch", "named"),
    [
        (["a"], None, ["a"]),
        (["--watch"], -1, []),
        (["--watch", "a", "b"], -1, ["a", "b"]),
        (["a", "--watch"], -1, ["a"]),
        (["--watch", "5", "a"], 5, ["a"]),
        (["--watch=0.5", "a"], 0.5, ["a"]),
        (["a", "--watch", "10"], 10, ["a"]),
    ],
)
def test_the_number_after_watch_may_be_left_out(arguments: list[str], watch: float | None, named: list[str]) -> None:
    options = _parse(arguments)
    assert (options.watch, options.RUN) == (watch, named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--watch", "--json"], "--watch and --json cannot be combined"),
        (["--watch", "--why"], "--watch and --why cannot be combined"),
        (["--why", "--history"], "--why and --history cannot be combined"),
        (["--watch", "0"], "--watch 0: expected seconds"),
        (["--watch", "0.01"], "--watch 0.01: expected seconds, from 0.1 to 86400"),
        (["--watch", "nan"], "--watch nan: expected seconds"),
    ],
)
def test_what_cannot_be_combined_or_takes_no_effect_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _parse(arguments)


def test_one_run_is_shown_in_full_and_several_in_a_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "a")]) == 0
    assert capsys.readouterr().out.startswith(f"{runs / 'a'}: finished\n  step 9 of 9")
    assert main([str(runs / "a"), str(runs / "b")]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("RUN ")
    assert main([str(runs)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main([str(runs), "--why"]) == 0
    assert capsys.readouterr().out.count("finished\n  #1 ") == 2


def test_json_of_several_runs_has_no_goodput_unless_all_rows_are_read(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(runs / "a"), "--json"]) == 0
    (one,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert one["goodput"]["productive_s"] > 0
    assert main([str(runs), "--json"]) == 0
    several = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [run["goodput"] for run in several] == [None, None]
    assert several[0].keys() == one.keys()
    assert main([str(runs), "--json", "--history"]) == 0
    full = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(run["goodput"]["productive_s"] > 0 and len(run["history"]) == 1 for run in full)
