"""hpcgpt.sample: prompts from files, other programs and a keyboard. tests/test_eval.py has what texts are made of."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import sample
from hpcgpt.errors import UserError
from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.processes  # another process trains the run

FLAGS = ("--tokens", "12")


def objects(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert sample.main([*arguments, "--json", *FLAGS]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_each_prompt_of_a_file_is_continued_as_if_it_were_alone(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, prompts = str(finished_run), ["def main", " 斗之力  ", "two\nlines"]
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\ufeffdef main\r\n\n 斗之力  \n", encoding="utf-8")
    rows.write_text("".join(json.dumps({"id": n, "prompt": prompt}) + "\n\n" for n, prompt in enumerate(prompts)))
    alone = [row for prompt in prompts for row in objects(capsys, run, "--prompt", prompt, "--samples", "2")]
    assert objects(capsys, run, "--prompts", str(rows), "--samples", "2") == alone
    assert objects(capsys, run, "--prompts", str(lines), "--samples", "2") == alone[:4]
    assert [(row["prompt"], row["sample"], row["seed"]) for row in alone[:3]] == [
        ("def main", 1, 0), ("def main", 2, 1), (" 斗之力  ", 1, 0)
    ]  # fmt: skip
    assert {(row["step"], row["tokens"], row["checkpoint"]) for row in alone} == {
        (12, 12, str(finished_run / "checkpoints/step_000000012"))
    }
    assert sample.main([run, "--prompts", str(lines), *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert f"--- prompt 1, sample 1\ndef main{alone[0]['text']}\n--- prompt 2, sample 1\n 斗之力  " in shown


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.txt", None, "none.txt: No such file or directory"),
        ("empty.txt", b"\n \n", "empty.txt has no prompt: expected one a line"),
        ("latin.txt", b"good\ncaf\xe9\n", "latin.txt, line 2 is not UTF-8"),
        ("rows.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2: expected a JSON object with a text "prompt"'),
        ("rows.jsonl", b"[1]\n", "rows.jsonl, line 1: expected"),
        ("rows.jsonl", b'{"prompt": 1}\n', "rows.jsonl, line 1: expected"),
    ],
)  # fmt: skip
def test_a_file_without_prompts_is_refused(
    name: str, content: bytes | None, sentence: str, finished_run: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        sample.main([str(finished_run), "--prompts", str(tmp_path / name)])


def test_json_is_for_programs_and_not_for_conversations(finished_run: Path) -> None:
    with pytest.raises(UserError, match="--prompts - reads prompts from another program"):
        sample.main([str(finished_run), "--interactive", "--json"])


def test_another_program_asks_line_by_line_and_may_close_the_pipe(finished_run: Path) -> None:
    command = [sys.executable, "-m", "hpcgpt.sample", str(finished_run), "--prompts", "-", "--json", "--tokens", "5"]
    with subprocess.Popen(command, cwd=ROOT, env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as running:  # fmt: skip
        assert running.stdin
        assert running.stdout
        assert running.stderr
        for prompt in ("one", "二"):
            running.stdin.write(f"{prompt}\n".encode())
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["prompt"] == prompt  # before the next one is asked
        running.stdout.close()
        running.stdin.write(b"three\n")
        running.stdin.close()
        assert running.stderr.read() == b""
        assert running.wait(60) == 0


def test_a_conversation_on_a_terminal(finished_run: Path) -> None:
    """Ctrl-C ends a text that is being written, and without one the command; there is no traceback."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "hpcgpt.sample", str(finished_run), "--interactive", "--tokens", "1000000"]
    with subprocess.Popen(command, cwd=ROOT, env=clean_env() | {"TERM": "dumb"}, stdin=follower, stdout=follower,
                          stderr=subprocess.PIPE, start_new_session=True) as running:  # fmt: skip
        os.close(follower)
        screen = Screen(leader)
        screen.wait_for("Ctrl-D: quit.")
        for typed in ("def f", "二"):
            screen.wait_for("\n> ")  # a text may have "> " in it
            os.write(leader, f"{typed}\n".encode())
            screen.wait_for(typed)  # its echo
            screen.wait_for(typed)  # the text
            screen.wait_for_more(20)
            os.kill(running.pid, signal.SIGINT)
        screen.wait_for("\n> ")
        while running.poll() is None:  # readline misses a signal that comes just before it waits for a key
            os.kill(running.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                running.wait(5)
        assert running.returncode == 130
        assert running.stderr
        assert running.stderr.read() == b""
    os.close(leader)


def test_an_interrupted_text_ends_its_line_and_the_command(finished_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hpcgpt.sample", str(finished_run), "--tokens", "1000000"]
    with open(tmp_path / "out", "wb") as out, subprocess.Popen(command, cwd=ROOT, env=clean_env(), stdout=out,
                                                               stderr=subprocess.PIPE) as running:  # fmt: skip
        deadline = time.monotonic() + 100
        while (tmp_path / "out").stat().st_size < 300:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        assert running.stderr
        assert running.stderr.read() == b""
        assert running.wait(60) == 130
    assert (tmp_path / "out").read_bytes().endswith(b"\n")
    assert "--- sample 1\n" in (tmp_path / "out").read_text(errors="replace")


class Screen:
    """What a terminal receives."""

    def __init__(self, leader: int) -> None:
        self._leader, self._waiting = leader, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def wait_for(self, text: str) -> None:
        """Read until `text`; what follows is left for the next call."""
        while text not in self._waiting:
            self._read()
        self._waiting = self._waiting.partition(text)[2]

    def wait_for_more(self, characters: int) -> None:
        """Read until there are this many characters more."""
        while len(self._waiting) < characters:
            self._read()
        self._waiting = ""

    def _read(self) -> None:
        assert select.select([self._leader], [], [], 60)[0], self._waiting
        self._waiting += self._decoder.decode(os.read(self._leader, 1 << 16))
