"""hpcgpt.tracking: one wandb run over all attempts, and nothing that wandb does or suffers can hurt training.

What is on disk is read with wandb's own reader, ``wandb leet inspect``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, clean_env, command, rows

from hpcgpt import runfolder
from hpcgpt.config import Config, Run, Tracking
from hpcgpt.runfolder import AGAIN, FINISHED
from hpcgpt.tracking import Tracker, check, choose_mode

ENDS_EARLY = "wandb leet inspect: reached the end of an incomplete .wandb file"


def fragments(folder: Path) -> list[list[dict[str, Any]]]:
    """The records of each attempt's .wandb file, the oldest attempt first."""
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        # It exits with 0 on a damaged file too, but then complains; of a process that was killed the file just ends.
        read = command("wandb", "leet", "inspect", "--json", str(path))
        assert read.returncode == 0
        assert read.stderr == "" or read.stderr.startswith(ENDS_EARLY)
        found.append([json.loads(line) for line in read.stdout.splitlines()])
    return found


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one attempt, without its samples."""
    found = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [item for item in found if "train/loss" in item]


def start(*flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "hpcgpt.train", *flags, "--tracking.wandb", "offline"], cwd=ROOT,
                            env=clean_env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_for_rows(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    while not (folder / "metrics.jsonl").exists() or len(rows(folder / "metrics.jsonl")) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "--no-headers", "-o", "pid", "--ppid", str(pid)], capture_output=True, text=True,
                            check=False)  # fmt: skip
    return [int(word) for word in listed.stdout.split()]


# --- a run over several attempts -------------------------------------------------------------------


def test_attempts_share_one_id_and_no_row_is_missing_after_a_signal_to_every_process_and_a_sigkill(
    tiny: Path, tmp_path: Path
) -> None:
    """Three attempts: told to leave as Slurm does it, by a signal to each process; killed; and the last one."""
    folder = tmp_path / "runs" / "tiny"
    flags = [str(tiny), "--train.steps", "250", "--checkpoint.every", "50", "--eval.every", "100"]
    told = start(*flags)
    wait_for_rows(folder, 20, told)
    cores = children(told.pid)
    assert len(cores) == 1, "wandb has no process of its own, so this shows nothing"
    for pid in [*cores, told.pid]:
        os.kill(pid, signal.SIGTERM)
    assert told.wait(60) == AGAIN, told.communicate()[1]
    assert "Traceback" not in told.communicate()[1]

    killed = start(*flags)
    wait_for_rows(folder, 60, killed)
    cores = children(killed.pid)
    for pid in cores:  # the warning before the time limit reaches it too, and there may be minutes left
        os.kill(pid, signal.SIGUSR1)
    wait_for_rows(folder, 120, killed)
    assert children(killed.pid) == cores, "wandb's core has died of the warning"
    for pid in [*children(killed.pid), killed.pid]:
        os.kill(pid, signal.SIGKILL)
    killed.communicate()

    last = command("hpcgpt.train", *flags, "--tracking.wandb", "offline")
    assert last.returncode == FINISHED, last.stderr

    attempts = fragments(folder)
    assert len(attempts) == 3
    ids = {record["run"]["run_id"] for records in attempts for record in records if record["type"] == "run"}
    assert ids == {runfolder.run_id(folder)}
    sent = {item["step"]: item for records in attempts for item in history(records)}
    expected = rows(folder / "metrics.jsonl")
    assert sorted(sent) == [row["step"] for row in expected] == list(range(1, 251))
    for row in expected:
        assert {key: sent[row["step"]][key] for key in row} == pytest.approx(row)


LOG = """
import dataclasses, sys, time
from pathlib import Path
from hpcgpt.config import Config, Run, Tracking
from hpcgpt.tracking import Tracker
config = Config(run=Run(name="run", dir=sys.argv[1]), tracking=Tracking(wandb="offline"))
config.run_folder.mkdir()
tracker = Tracker(config, "abcdefghij", dataclasses.asdict(config), [])
for step in range(1, 10**9):
    tracker.write({"step": step, "time": time.time(), "train/loss": 1.0})
    print(step, flush=True)
    time.sleep(0.25)  # few enough rows that wandb's buffer does not fill up and flush itself
"""


def test_sigkill_loses_no_row_but_those_of_the_seconds_that_the_next_attempt_repeats(tmp_path: Path) -> None:
    from hpcgpt.metrics import NEWEST_S

    logging = subprocess.Popen([sys.executable, "-c", LOG, tmp_path], cwd=ROOT, env=clean_env(),
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert logging.stdout is not None
    sent = {int(logging.stdout.readline()): time.time()}
    while time.time() - min(sent.values()) < NEWEST_S + 2:
        sent[int(logging.stdout.readline())] = time.time()
    for pid in [*children(logging.pid), logging.pid]:  # as Slurm does it: wandb's core has no second either
        os.kill(pid, signal.SIGKILL)
    logging.communicate()
    (records,) = fragments(tmp_path / "run")
    there = {item["step"] for item in history(records)}
    newest = max(sent.values())
    assert {step for step, at in sent.items() if at < newest - NEWEST_S} <= there
    assert there == set(range(1, max(there) + 1))


KILLED_CORE = """
import dataclasses, os, signal, sys, time
from pathlib import Path
from hpcgpt import tracking
from hpcgpt.config import Config, Run, Tracking
tracking.RETRY_S = 1.0
config = Config(run=Run(name="run", dir=sys.argv[1]), tracking=Tracking(wandb="offline"))
config.run_folder.mkdir()
tracker = tracking.Tracker(config, "abcdefghij", dataclasses.asdict(config), [])
mine = str(os.getpid())
for step in range(1, 61):
    if step == 30:  # as a full disk or Slurm's SIGTERM does it
        for stat in Path("/proc").glob("[0-9]*/stat"):
            if stat.read_text().rpartition(")")[2].split()[1] == mine:
                os.kill(int(stat.parent.name), signal.SIGKILL)
    tracker.write({"step": step, "time": time.time(), "train/loss": 1.0})
    time.sleep(0.1)
tracker.close(0)
"""


def test_a_core_that_died_in_mid_attempt_is_started_anew_and_no_row_is_missing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED_CORE, tmp_path], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning: wandb failed and is tried again in 1 s" in done.stderr
    parts = fragments(tmp_path / "run")
    assert len(parts) == 2
    assert {item["step"] for records in parts for item in history(records)} == set(range(1, 61))
    assert {record["run"]["run_id"] for records in parts for record in records if record["type"] == "run"} == {
        "abcdefghij"}  # fmt: skip


OUTAGE = """
import dataclasses, os, signal, sys, time
from pathlib import Path
from hpcgpt import metrics, tracking
from hpcgpt.config import Config, Run, Tracking
metrics.NEWEST_S = tracking.NEWEST_S = 1.5
config = Config(run=Run(name="run", dir=sys.argv[1]), tracking=Tracking(wandb="offline"))
first, last, dies_at = map(int, sys.argv[2:])
config.run_folder.mkdir(exist_ok=True)
file = metrics.MetricsFile(config.run_folder / "metrics.jsonl", first, tracking.arrived(config.run_folder))
tracker = tracking.Tracker(config, "abcdefghij", dataclasses.asdict(config), file.again)
mine = str(os.getpid())
for step in range(first, last + 1):
    if step == dies_at:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            if stat.read_text().rpartition(")")[2].split()[1] == mine:
                os.kill(int(stat.parent.name), signal.SIGKILL)
    row = {"step": step, "time": time.time(), "train/loss": 1.0}
    file.write(row)
    tracker.write(row)
    time.sleep(0.05)
if dies_at:
    os.kill(os.getpid(), signal.SIGKILL)
tracker.close(0)
"""


def test_what_an_attempt_that_was_killed_within_an_outage_could_not_send_the_next_one_sends(tmp_path: Path) -> None:
    """wandb is gone from step 40 on, and the run seconds later at step 110. Then it goes back to step 20: the same."""
    for first, last, dies_at in ((1, 110, 40), (111, 112, 0), (21, 60, 22), (61, 62, 0)):
        done = subprocess.run([sys.executable, "-c", OUTAGE, tmp_path, str(first), str(last), str(dies_at)], cwd=ROOT,
                              env=clean_env(), capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == (-signal.SIGKILL if dies_at else 0), done.stderr
        assert ("warning: wandb failed" in done.stderr) == bool(dies_at)
    parts = [{item["step"] for item in history(records)} for records in fragments(tmp_path / "run")]
    assert len(parts) == 4
    assert parts[0] | parts[1] == set(range(1, 113))
    assert parts[2] | parts[3] >= set(range(21, 63))
    assert len(parts[1]) < 112, "all is sent again"


# --- what is sent ----------------------------------------------------------------------------------


def settings(tmp_path: Path, mode: str) -> Config:
    config = Config(run=Run(name="run", dir=str(tmp_path)), tracking=Tracking(wandb=mode))  # type: ignore[arg-type]
    config.run_folder.mkdir(exist_ok=True)
    return config


def test_rows_of_the_attempt_before_come_first_and_samples_are_shown_as_they_are(tmp_path: Path) -> None:
    code = """
import dataclasses, sys
from hpcgpt.config import Config, Run, Tracking
from hpcgpt.tracking import Tracker
config = Config(run=Run(name="run", dir=sys.argv[1]), tracking=Tracking(wandb="offline", project="novels"))
config.run_folder.mkdir()
tracker = Tracker(config, "abcdefghij", dataclasses.asdict(config), [{"step": 4, "time": 4.0, "train/loss": 3.0}])
tracker.write({"step": 5, "time": 5.0, "train/loss": 2.0, "val/loss": 2.5})
tracker.sample(5, "<b>萧炎 & co</b>")
tracker.close(0)
tracker.write({"step": 6, "time": 6.0, "train/loss": 1.0})
tracker.close(0)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (records,) = fragments(tmp_path / "run")
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(item["step"], item.get("train/loss"), item.get("val/loss")) for item in items] == [
        (4, 3.0, None), (5, 2.0, 2.5), (5, None, None)]  # fmt: skip
    (run,) = (record["run"] for record in records if record["type"] == "run")
    assert (run["run_id"], run["display_name"], run["project"]) == ("abcdefghij", "run", "novels")
    axes = [record["metric"] for record in records if record["type"] == "metric"]
    assert {"step"} == {axis["step_metric"] for axis in axes if axis.get("glob_name") == "*"}
    (page,) = (tmp_path / "run/wandb").glob("offline-run-*/files/media/html/*.html")
    assert "<pre>&lt;b&gt;萧炎 &amp; co&lt;/b&gt;</pre>" in page.read_text(encoding="utf-8")


def test_disabled_makes_no_folder_and_takes_every_row(tmp_path: Path) -> None:
    config = settings(tmp_path, "disabled")
    tracker = Tracker(config, "abcdefghij", dataclasses.asdict(config), [{"step": 1}])
    tracker.write({"step": 2})
    tracker.sample(2, "text")
    tracker.close(0)
    assert list(config.run_folder.iterdir()) == []


# --- online, offline or disabled -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nowhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key, and no variable of wandb's; returns where a netrc file would be."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("HOME", str(home))
    return home / ".netrc"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A port of this machine where somebody answers, as wandb's server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield listener


def test_online_without_a_key_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="there is no key: run `wandb login`, or use offline"):
        check("online")
    for wanted in ("auto", "offline", "disabled"):
        check(wanted)


def test_auto_without_a_key_is_offline(server: Any) -> None:
    assert server
    assert choose_mode("auto") == "offline"


def test_auto_with_a_key_and_a_server_that_answers_is_online(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check("online")
    assert choose_mode("auto") == "online"
    server.close()
    assert choose_mode("auto") == "offline"


def test_a_key_in_netrc_counts_for_its_server_only(server: Any, nowhere: Path) -> None:
    assert server
    nowhere.write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    nowhere.chmod(0o600)
    assert choose_mode("auto") == "offline"
    nowhere.write_text(f"machine 127.0.0.1 login user password {'k' * 40}\n")
    assert choose_mode("auto") == "online"


def test_a_netrc_that_cannot_be_read_is_no_key(nowhere: Path) -> None:
    nowhere.write_text("machine\n")
    assert choose_mode("auto") == "offline"


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_mode_in_the_environment_decides_auto_and_nothing_else(
    mode: str, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    assert choose_mode("auto") == mode
    assert choose_mode("online") == "online"
    assert choose_mode("offline") == "offline"
    assert choose_mode("disabled") == "disabled"
