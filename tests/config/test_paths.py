"""hpcgpt.config.paths and hpcgpt.output.terminal: paths and names that a user writes, and text on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.config import paths
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from tests.programs import ROOT, clean_env


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with a home below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setenv("EMPTY", "")
    return tmp_path


# --- paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("runs", "runs"),
        ("/data/shards", "/data/shards"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("${SCRATCH}1/runs", "/scratch/me1/runs"),
        ("a~b", "a~b"),
        ("cost$", "cost$"),
        ("a$1", "a$1"),
        ("萧 炎", "萧 炎"),
    ],
)
def test_variables_are_expanded_as_by_a_shell(written: str, expected: str) -> None:
    assert paths.expand(written, "--run.dir") == expected


def test_a_tilde_is_the_home_folder(at_home: Path) -> None:
    assert paths.expand("~/runs", "--run.dir") == str(at_home / "home" / "runs")
    assert paths.expand("~root/runs", "--run.dir") == "/root/runs"


@pytest.mark.parametrize("written", ["~lock.txt", "~", "$SCRATCH", "$UNSET", "a\nb", "a\x1bb"])
def test_a_path_that_exists_as_written_is_not_expanded(written: str, at_home: Path) -> None:
    (at_home / written).touch()
    assert paths.expand(written, "INPUT") == written


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("~lock.txt", "INPUT '~lock.txt': there is no such file here, and ~ is not the home folder of a user"),
        ("~nosuchuser/x", "or ./~nosuchuser/x"),
        ("$UNSET/x", "the environment variable UNSET is not set, or empty"),
        ("${EMPTY}/x", "the environment variable EMPTY is not set, or empty"),
        ("a\nb", r"INPUT 'a\nb': a path must have no control characters"),
        ("a\x1b[2Jb", r"INPUT 'a\x1b[2Jb': a path must have no control characters"),
        ("a\0b", r"INPUT 'a\x00b': a path has no NUL characters"),
        ("", "INPUT is empty: in a shell, so is a variable that is not set"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused_with_a_remedy(written: str, sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        paths.expand(written, "INPUT")


def test_control_characters_of_a_variable_are_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch\n")
    with pytest.raises(UserError, match="no control characters"):
        paths.expand("$SCRATCH/x", "--out")


def test_a_percent_sign_is_escaped_for_slurm() -> None:
    assert paths.literal_in_slurm(Path("runs/50%j")) == "runs/50%%j"


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", 'it\'s a "run"', "50%", "萧炎" * 33, "x" * 200, "a.b-c"])
def test_a_plain_name_is_valid(name: str) -> None:
    assert paths.problem_of_name(name) == ""


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "it is empty"),
        (".", "begins with"),
        ("..", "begins with"),
        (".hidden", "begins with"),
        ("-rf", "begins with"),
        ("a/b", "has a /"),
        ("a\nb", "control characters"),
        ("a\x7fb", "control characters"),
        ("a\x9bb", "control characters"),
        ("a\u202eb", "control characters"),
        ("x" * 201, "it has 201 bytes, and 200 are the most"),
        ("萧" * 67, "it has 201 bytes"),
    ],
)
def test_a_name_that_is_special_to_file_systems_scripts_or_terminals_is_refused(name: str, problem: str) -> None:
    assert problem in paths.problem_of_name(name)


# --- text on a terminal ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 萧炎, café\n\tשלום", "plain 萧炎, café\n\tשלום"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("over\rwritten\x08", r"over\rwritten\x08"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\u2066a\u2069", r"\u2066a\u2069"),
        ("a\udc80b", r"a\udc80b"),
        ("a\u2028b", r"a\u2028b"),
        ("\u200b\U0001f469\u200d\U0001f52c", "\u200b\U0001f469\u200d\U0001f52c"),
    ],
)
def test_control_characters_are_shown_escaped(text: str, expected: str) -> None:
    assert terminal.shown(text) == expected


def test_on_one_line_line_ends_are_escaped_too() -> None:
    assert terminal.printable("a\nb\tc") == r"a\nb\tc"


@pytest.mark.processes
def test_stdout_gets_every_byte_unless_it_is_a_terminal() -> None:
    code = r"from hpcgpt.output import terminal; print(terminal.for_stdout('a\x1b[2J'))"
    command = [sys.executable, "-c", code]
    piped = subprocess.run(command, cwd=ROOT, env=clean_env(), capture_output=True, check=True)
    assert piped.stdout == b"a\x1b[2J\n"
    leader, follower = pty.openpty()
    with open(leader, "rb", buffering=0) as screen:
        subprocess.run(command, cwd=ROOT, env=clean_env(), stdout=follower, check=True)
        assert screen.read(100) == b"a\\x1b[2J\r\n"
        os.close(follower)
