"""hpcgpt.tracking.wandb_process: the process beside rank 0. test_tracker.py tests what it does with wandb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.tracking.tracker import STATE
from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.processes

# The process that replaces it prints what it was given: its state, and its standard input.
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
    threading.Event().wait()  # the worst moment: what was read is not stored yet
os.read = read_and_stop
process = Process(Path(sys.argv[1]), "online", 1)
threading.Thread(target=process._listen, daemon=True).start()
print("listening", flush=True)
has_read.wait(2)
sys.executable = sys.argv[2]
process.replace()
"""


def test_a_message_of_training_survives_a_restart_at_that_moment(tmp_path: Path) -> None:
    successor = tmp_path / "successor"
    successor.write_text(SUCCESSOR)
    successor.chmod(0o755)
    command = [sys.executable, "-c", REPLACED, str(tmp_path), str(successor)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env=clean_env()) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        process.stdin.write("finish 3 60\n")
        process.stdin.flush()
        state = json.loads(process.stdout.readline())  # it has been replaced
        process.stdin.close()
        assert state["finish"] is not None or process.stdout.read() == "finish 3 60\n"


@pytest.mark.parametrize(("message", "status"), [("finish 3 60\n", 3), ("", 1)])
def test_finish_or_the_end_of_training_is_noted_before_the_next_restart(
    tmp_path: Path, message: str, status: int
) -> None:
    """Standard input is closed at once, and the process is replaced when it has seen that."""
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
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(successor)], input=message, text=True,
                          capture_output=True, cwd=ROOT, env=clean_env(), check=False)  # fmt: skip
    assert json.loads(done.stdout.splitlines()[0])["finish"][0] == status, done.stderr
