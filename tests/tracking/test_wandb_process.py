"""hpcgpt.tracking.wandb_process: the process beside rank 0. test_tracker.py tests what it does with wandb."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcgpt.tracking.tracker import STATE
from tests.programs import ROOT, clean_env
from tests.tracking.attempts import Attempt, fragments, home, server, steps_of

__all__ = ["home", "server"]  # fixtures

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


def test_a_process_that_fails_for_days_is_started_again_each_time(tmp_path: Path) -> None:
    """The pause between two starts doubles up to a minute, whatever the number of failures."""
    successor = tmp_path / "successor"
    successor.write_text(SUCCESSOR)
    successor.chmod(0o755)
    code = """
import sys
from pathlib import Path
from hpcgpt.tracking.wandb_process import Process

process = Process(Path(sys.argv[1]), "online", 1)
process.changed.set()  # no pause
sys.executable = sys.argv[2]
process._start_again(OSError("no network"))
"""
    env = {**clean_env(), STATE: json.dumps({"failures": 5000})}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(successor)], stdin=subprocess.DEVNULL,
                          text=True, capture_output=True, cwd=ROOT, env=env, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["failures"] == 5001


@pytest.mark.usefixtures("server")
def test_a_run_whose_server_did_not_answer_for_days_is_kept_offline(tmp_path: Path) -> None:
    """So is the pause before the server is asked again."""
    attempt = Attempt(tmp_path, "disabled")
    attempt.write(range(1, 6))
    state = {"offline": "the server does not answer", "probes": 5000, "finish": (0, time.time() + 60)}
    command = [sys.executable, "-m", "hpcgpt.tracking.wandb_process", str(attempt.folder), "auto", "1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, capture_output=True, cwd=ROOT,
                          env={**os.environ, STATE: json.dumps(state)}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert steps_of(fragments(attempt.folder)) == [1, 2, 3, 4, 5]
