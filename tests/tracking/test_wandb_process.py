"""hpcgpt.tracking.wandb_process: the process beside rank 0. What it does with wandb is in test_tracker.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.tracking.tracker import STATE
from tests.programs import ROOT, clean_env

# The process that it is replaced by says what it was given: its state, and what is in its standard input.
SUCCESSOR = f"""#!/bin/sh
echo "${STATE}"
exec cat
"""
REPLACED = """
import os, sys, threading
from pathlib import Path
from hpcgpt.tracking.wandb_process import Process

has_read, read = threading.Event(), os.read
def read_and_stop(*arguments):
    found = read(*arguments)
    has_read.set()
    threading.Event().wait()  # the worst moment: what was read is nowhere yet
os.read = read_and_stop
process = Process(Path(sys.argv[1]), "online", 1)
threading.Thread(target=process._listen, daemon=True).start()
print("listens", flush=True)
has_read.wait(2)
sys.executable = sys.argv[2]
process.replace()
"""


def test_a_word_of_training_outlives_a_restart_that_comes_at_that_moment(tmp_path: Path) -> None:
    successor = tmp_path / "successor"
    successor.write_text(SUCCESSOR)
    successor.chmod(0o755)
    words = [sys.executable, "-c", REPLACED, str(tmp_path), str(successor)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env=clean_env()) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        process.stdin.write("finish 3 60\n")
        process.stdin.flush()
        state = json.loads(process.stdout.readline())  # it has been replaced
        process.stdin.close()
        assert state["finish"] is not None or process.stdout.read() == "finish 3 60\n"


@pytest.mark.parametrize(("words", "status"), [("finish 3 60\n", 3), ("", 1)])
def test_a_finish_or_the_end_of_training_is_noted_before_the_next_restart(
    tmp_path: Path, words: str, status: int
) -> None:
    """Its pipe is closed at once, and it is replaced when that has been seen."""
    successor = tmp_path / "successor"
    successor.write_text(SUCCESSOR)
    successor.chmod(0o755)
    code = """
import sys, threading
from pathlib import Path
from hpcgpt.tracking.wandb_process import Process

process = Process(Path(sys.argv[1]), "online", 1)
threading.Thread(target=process._listen, daemon=True).start()
process.changed.wait(60)
sys.executable = sys.argv[2]
process.replace()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(successor)], input=words, capture_output=True,
                          text=True, cwd=ROOT, env=clean_env(), check=False)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[0])["finish"][0] == status, done.stderr
