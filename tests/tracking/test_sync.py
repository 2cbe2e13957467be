"""``hpcgpt tracking sync``: everything is sent once, or it fails and says why."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.exit_codes import FAILED, USER_MISTAKE
from hpcgpt.run import run_folder
from hpcgpt.tracking import __main__ as tracking_command
from tests.disks import another_user
from tests.programs import ROOT
from tests.tracking.attempts import LONG_S, Attempt, children, fragments, home, server, steps_of, sync, until

__all__ = ["home", "server"]  # fixtures

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def failing_sync(folder: Path, within_s: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpcgpt.tracking", "sync", str(folder), "--within", str(within_s)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_rows_are_not_sent_before_it_is_known_which_have_arrived(tmp_path: Path, server: WandbServer) -> None:
    """The server takes rows, but does not return which it has: the next attempt stays offline, sync fails."""
    first = Attempt(tmp_path)
    first.write(range(1, 11))
    first.tracker.close(0, LONG_S)
    assert server.steps(first.id) == list(range(1, 11))
    server.mode = "unreadable"
    second = Attempt(tmp_path, keep=10)
    second.write(range(11, 16))
    until(lambda: any("does not return which" in event.get("words", "") for event in run_folder.events(second.folder)))
    second.tracker.close(0, LONG_S)
    assert server.steps(first.id) == list(range(1, 11))
    (second.folder / "generations/000002.done").touch()
    (second.folder / "generations/000001.done").touch()
    done = failing_sync(second.folder, 20)
    assert done.returncode == FAILED
    assert server.steps(first.id) == list(range(1, 11))
    server.mode = "healthy"
    sync(second.folder)
    assert server.steps(first.id) == list(range(1, 16))


def test_a_second_sync_of_a_run_is_refused_while_the_first_one_sends(tmp_path: Path, server: WandbServer) -> None:
    """Both would send the same rows. The process that sends continues when the command itself is killed."""
    attempt = Attempt(tmp_path, "disabled")
    attempt.write(range(1, 11))
    (attempt.folder / "generations/000001.done").touch()
    server.mode = "unreadable"
    command = [sys.executable, "-m", "hpcgpt.tracking", "sync", str(attempt.folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True) as first:
        try:
            until(lambda: list(attempt.folder.glob("wandb/run-*")))
            for is_killed in (False, True):
                if is_killed:
                    first.kill()
                    first.wait()
                done = failing_sync(attempt.folder, 10)
                assert done.returncode == USER_MISTAKE, done.stderr
                assert f"error: {attempt.folder}: another `hpcgpt tracking sync` is sending it" in done.stderr
        finally:
            os.killpg(first.pid, signal.SIGKILL)
    server.mode = "healthy"
    sync(attempt.folder)
    assert server.steps(attempt.id) == list(range(1, 11))


def test_a_folder_for_wandb_sync_is_whole_after_wandb_was_killed_midway(tmp_path: Path) -> None:
    """Its process starts again, from the first row on, and the part from before is not there to be sent, too."""
    attempt, offline = Attempt(tmp_path, "disabled"), tmp_path / "offline"
    attempt.write(range(1, 3_001))
    command = [sys.executable, "-m", "hpcgpt.tracking", "sync", str(attempt.folder), "--offline", str(offline)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as made:
        until(lambda: list(offline.glob("wandb/offline-run-*/*.wandb")))
        (sender,) = children(made.pid)
        for core in children(sender):
            os.kill(core, signal.SIGKILL)
        output, errors = made.communicate()
    assert made.returncode == 0, errors
    assert "failed and is started again" in errors
    (part,) = fragments(offline)
    assert steps_of([part]) == list(range(1, 3_001))
    assert output.startswith(f"made {next(offline.glob('wandb/offline-run-*'))}; ")


@pytest.mark.parametrize(
    ("within_s", "status", "why"),
    [
        ("-1", 1, "it takes longer than -1 s: repeat the command, which continues, or raise --within"),
        ("60", -9, "the process that sends it ended with status -9"),
    ],
)
def test_a_process_that_ends_without_a_word_is_reported(
    within_s: str, status: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It ends so at its deadline."""
    (tmp_path / "run.json").write_text('{"id": "a"}')
    (tmp_path / "config.toml").write_text("")
    ended = subprocess.CompletedProcess[str]([], status)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    offline = str(tmp_path / "offline")
    assert tracking_command.main(["sync", str(tmp_path), "--offline", offline, "--within", within_s]) == FAILED
    assert capsys.readouterr().err == f"error: {tmp_path}: not everything is sent: {why}\n"


def test_a_copied_folder_that_has_gone_back_is_not_sent_to_the_run_of_the_original(
    tmp_path: Path, server: WandbServer
) -> None:
    """It would cut the rows of the original off. Without events of its own it has nothing but rows of the original."""
    original = Attempt(tmp_path, "disabled")
    original.write(range(1, 11))
    sync(original.folder)
    copy = shutil.copytree(original.folder, tmp_path / "copy")
    sync(copy)
    assert server.steps(original.id) == list(range(1, 11))
    run_folder.record(copy, "went_back", attempt=2, step=5, from_step=10)
    done = failing_sync(copy, 10)
    assert done.returncode == USER_MISTAKE
    assert f"{copy} is a copy of {original.folder} and still has its id" in done.stderr
    assert server.steps(original.id) == list(range(1, 11))
    sync(copy, "--copy", "other")
    assert server.steps("other") == list(range(1, 6)), "the rows after step 5 are undone"
    assert server.steps(original.id) == list(range(1, 11))


def test_an_empty_copy_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a variable of the shell that is not set: the run itself would be sent again."""
    with pytest.raises(SystemExit) as caught:
        tracking_command.main(["sync", str(tmp_path), "--copy", ""])
    assert caught.value.code == USER_MISTAKE
    assert "argument --copy: it is empty" in capsys.readouterr().err


def test_settings_that_wandb_refuses_are_named_and_nothing_is_written(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt(tmp_path, "disabled")
    attempt.write(range(1, 6))
    monkeypatch.setenv("WANDB_BASE_URL", "no address")
    done = failing_sync(attempt.folder, 60)
    assert done.returncode == FAILED
    assert "nothing was sent, because" in done.stderr
    assert not list(attempt.folder.glob("wandb/*run*"))
    assert not server.history


@pytest.mark.usefixtures("server")
def test_a_run_whose_configuration_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "disabled")
    attempt.write(range(1, 6))
    (attempt.folder / "config.toml").write_text("[model]\nunknown = 1\n")
    done = failing_sync(attempt.folder, 3600)
    assert done.returncode == USER_MISTAKE
    assert "unknown" in done.stderr


def test_a_line_that_cannot_be_shown_does_not_stop_those_after_it(tmp_path: Path, server: WandbServer) -> None:
    attempt = Attempt(tmp_path)
    run_folder.record(attempt.folder, "straggler", attempt=1, step=2, rank=0, host="n1", factor="twice")
    attempt.write(range(1, 6))
    attempt.tracker.close(0, LONG_S)
    assert server.steps(attempt.id) == list(range(1, 6))


def test_without_a_key_it_is_said_what_works(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, "disabled")
    attempt.write(range(1, 6))
    done = failing_sync(attempt.folder, 60)
    assert done.returncode == USER_MISTAKE
    assert "run `wandb login`. Without one, make a folder" in done.stderr
    assert f"hpcgpt tracking sync {attempt.folder} --offline DIR" in done.stderr


def test_a_folder_of_another_user_is_not_locked(tmp_path: Path) -> None:
    """wandb sends from it nevertheless, with its files elsewhere."""
    tmp_path.chmod(0o755)
    with another_user(), tracking_command._alone(tmp_path) as lock:
        assert lock == ()
    with tracking_command._alone(tmp_path) as lock:
        assert len(lock) == 1
