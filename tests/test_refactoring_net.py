"""tests/refactoring_net.py: it finds equal code equal, and shows the difference if one constant is changed.

The whole comparison is started by hand, see tests/refactoring_net.py; here it is made small.

"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

from tests.programs import ROOT
from tests.refactoring_net import report
from tests.refactoring_outcomes import plan

SMALL = ["--only", "run: gpt2, 1 ranks, muon, zero1", "--only", "run: continued on fewer ranks", "--only", "old: *ver*"]
# It affects the random numbers of a run that continues on another number of ranks, and nothing else.
FACTOR = "104729 * "


def net(old: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.refactoring_net", "--against", str(old), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def verdicts(printed: str) -> dict[str, str]:
    """Return what the table says of each outcome: 'equal', or what is different."""
    lines = [line for line in printed.splitlines() if " files  " in line]
    return {line.partition("  ")[0]: line.split(" files  ")[1].split("  ", 1)[1] for line in lines}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The present code in a separate folder, to be changed."""
    for package in ("hpcgpt", "data_prep"):
        shutil.copytree(ROOT / package, tmp_path / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "code"


def replace_once(code: Path, old: str, new: str) -> None:
    """Change a constant, whichever file it is in."""
    found = [path for path in code.rglob("*.py") if old in path.read_text(encoding="utf-8")]
    assert len(found) == 1, f"'{old}' is in {found}: find another constant for this test"
    found[0].write_text(found[0].read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.processes
@pytest.mark.long
def test_one_other_constant_is_found_where_it_has_an_effect_and_nowhere_else(copied: Path, tmp_path: Path) -> None:
    replace_once(copied, FACTOR, "104728 * ")
    done = net(copied, *SMALL, "--record", str(tmp_path / "record.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    found = verdicts(done.stdout)
    differs = found.pop("run: continued on fewer ranks")
    assert differs.startswith("DIFFERENT: ")
    # The checkpoint of two ranks was made before, and the one of the last step after.
    assert "step_000000008/tensors_00000_of_00001.safetensors" in differs
    assert "step_000000004" not in differs
    assert set(found.values()) == {"equal"}
    assert {"tokenizer", "shards: a trained tokenizer", "run: gpt2, 1 ranks, muon, zero1",
            "old: its shards and checkpoints verify"} <= found.keys()  # fmt: skip
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["different"] and record["hashes"].keys() == {*found, "run: continued on fewer ranks"}


@pytest.mark.processes
@pytest.mark.long
def test_the_same_code_is_equal() -> None:
    done = net(ROOT, "--only", "help: hpcgpt train", "--only", "help: data_prep.verify")
    assert done.returncode == 0, done.stdout + done.stderr
    found = verdicts(done.stdout)
    assert set(found.values()) == {"equal"}
    assert {"help: hpcgpt train", "help: data_prep.verify", "tokenizer"} <= found.keys()


@pytest.mark.processes
def test_the_folder_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hpcgpt").mkdir()
    done = net(tmp_path, "--only", "help: hpcgpt train")
    assert done.returncode == 1
    assert f"{tmp_path} holds no code that python would run" in done.stderr


def test_a_file_more_or_less_or_another_is_a_difference_and_words_can_be_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = {
        "help: x": {"words": b"one\ntwo\n", "options": b"--a"},
        "run: y": {"f": b"\xff", "g": b""},
        "gone": {"h": b""},
    }
    new = {"help: x": {"words": b"one\n2\n", "options": b"--a"}, "run: y": {"f": b"\xfe", "i": b""}}
    assert report(old, old, []) == []
    assert report(old, new, ["*: words"]) == ["run: y: f", "run: y: g", "run: y: i", "gone: h"]
    assert "help: x: words" in report(old, new, ["*: options"])
    printed = capsys.readouterr().out
    assert "different, as allowed: words" in printed
    assert "- two\n        + 2" in printed
    assert "g: only of the old code" in printed


@pytest.mark.processes
def test_half_of_the_combinations_has_every_pair() -> None:
    every, half = ([name for name in plan(ROOT, of_all) if name.count(", ") == 3] for of_all in (True, False))
    assert (len(every), len(half)) == (24, 12)
    assert pairs(half) == pairs(every)


def pairs(names: list[str]) -> set[tuple[str, str]]:
    return {pair for name in names for pair in combinations(name.removeprefix("run: ").split(", "), 2)}
