"""hpcgpt.tracking.tracker: one wandb run over all attempts, no row missing or doubled; training never waits for wandb.

The server is hpcgpt/drill/wandb_server.py on loopback; the client is the real wandb. Files on disk are read with
wandb's own reader, ``wandb leet inspect``.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from tests.programs import Running, clean_env
from tests.tiny_run import rows
from tests.tracking.attempts import KEY, LONG_S, Attempt, children, fragments, home, server, steps_of, sync, until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

__all__ = ["home", "server"]  # fixtures


# --- each row and sample arrives once --------------------------------------------------------------


def test_rows_and_samples_arrive_under_the_runs_id_with_the_names_of_metrics_jsonl(
    tmp_path: Path, server: WandbServer
) -> None:
    attempt = Attempt(tmp_path)
    attempt.write(range(1, 31))
    attempt.tracker.sample(30, "<b>萧炎 & co</b>")
    attempt.tracker.close(0, LONG_S)
    assert server.steps(attempt.id) == list(range(1, 31))
    first = server.history[attempt.id][0]
    assert (first["tokens"], first["train/loss"], "none" in first) == (64, 1.0, False)
    (sample,) = (line for line in server.history[attempt.id] if "sample" in line)
    assert sample["step"] == 30
    (page,) = (attempt.folder / "wandb").glob("run-*/files/media/html/*.html")
    assert ">&lt;b&gt;萧炎 &amp; co&lt;/b&gt;<" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("seen", [0, 1, 25])
def test_after_a_sigkill_at_any_moment_the_next_attempt_sends_exactly_what_the_server_lacks(
    tmp_path: Path, server: WandbServer, seen: int, capfd: pytest.CaptureFixture[str]
) -> None:
    killed = Attempt(tmp_path)
    killed.write(range(1, 26))
    killed.wait_for_process()
    assert server.wait(lambda: len(server.steps(killed.id)) >= seen)
    killed.write(range(26, 41))
    killed.kill()
    assert "wandb did not take everything: its process was ended by signal 9; the next" in capfd.readouterr().err
    # It resumes at its last checkpoint, and repeats steps 21 to 40.
    last = Attempt(tmp_path, keep=20)
    last.write(range(21, 51))
    last.tracker.close(0, LONG_S)
    assert sorted(server.steps(last.id)) == list(range(1, 51))


def test_after_a_rollback_the_server_has_each_step_once(tmp_path: Path, server: WandbServer) -> None:
    """The run is rewound: the server refuses that while it has not ended. An attempt after it sends nothing again."""
    attempt = Attempt(tmp_path)
    attempt.write(range(1, 21))
    attempt.tracker.sample(5, "kept")
    attempt.tracker.sample(20, "obsolete")
    assert server.wait(lambda: len(server.steps(attempt.id)) == 20)
    attempt.cut(10)
    run_folder.record(attempt.folder, "rollback", attempt=1, step=10, loss=9.5, spiked_step=21)
    attempt.write(range(11, 31))
    attempt.tracker.close(0, LONG_S)
    assert server.steps(attempt.id) == list(range(1, 31))
    sent = server.history[attempt.id]
    assert [row["sample/text"] for row in sent if "sample" in row] == ["kept"]
    rerun = Attempt(tmp_path, keep=30)
    rerun.tracker.close(0, LONG_S)
    assert [row for row in server.history[attempt.id] if "goodput/goodput" not in row] == [
        row for row in sent if "goodput/goodput" not in row
    ]
    own = [row["_step"] for row in server.history[attempt.id]]
    assert own == sorted(set(own))


def test_rows_of_an_attempt_whose_clock_was_ahead_are_replaced_when_the_run_goes_back(
    tmp_path: Path, server: WandbServer
) -> None:
    """Their times are after the start of the next attempt, on another host; the server has their attempt, too."""
    first = Attempt(tmp_path)
    run_folder.record(first.folder, "start", attempt=1, step=0)
    first.write(range(1, 21), clock_ahead_s=3600, attempt=1)
    first.tracker.close(0, LONG_S)
    run_folder.record(first.folder, "went_back", attempt=2, step=10, from_step=20)
    again = Attempt(tmp_path, keep=10)
    run_folder.record(first.folder, "start", attempt=2, step=10)
    again.write(range(11, 16), attempt=2)
    again.tracker.close(0, LONG_S)
    found = {row["step"]: row["attempt"] for row in server.history[first.id] if "tokens" in row}
    assert found == dict.fromkeys(range(1, 11), 1) | dict.fromkeys(range(11, 16), 2)


def test_a_server_that_cannot_rewind_keeps_both_and_the_log_says_so(
    tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of wandb's own step, `_step`, it refuses none. `--copy` makes a run without the obsolete rows."""
    server.rewinds = False
    first = Attempt(tmp_path)
    first.write(range(1, 21))
    first.tracker.close(0, LONG_S)
    run_folder.record(first.folder, "went_back", attempt=2, step=10, from_step=20)
    again = Attempt(tmp_path, keep=10)
    again.write(range(11, 26))
    again.tracker.close(0, LONG_S)
    assert server.steps(first.id) == [*range(1, 21), *range(11, 26)]
    assert "it cannot rewind" in capfd.readouterr().err
    sync(again.folder, "--copy", "clean")
    assert server.steps("clean") == list(range(1, 26))


@pytest.mark.parametrize("killed", [False, True])
def test_the_next_attempt_sends_what_an_outage_held_back(tmp_path: Path, server: WandbServer, killed: bool) -> None:
    """wandb has accepted the rows, but no server has received them."""
    stopped = Attempt(tmp_path)
    stopped.write(range(1, 11))
    assert server.wait(lambda: len(server.steps(stopped.id)) == 10)
    server.mode = "forgetful"
    stopped.write(range(11, 101))
    until(lambda: steps_of(fragments(stopped.folder, "run"))[-1:] == [100], 1.0)
    if killed:
        stopped.kill()
    else:
        stopped.tracker.close(75, 1.0)
    server.mode = "healthy"
    last = Attempt(tmp_path, keep=100)
    last.write(range(101, 111))
    last.tracker.close(0, LONG_S)
    assert server.steps(last.id) == list(range(1, 111))


def test_an_outage_that_ends_during_the_run_costs_nothing(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without an answer the tracker stays offline in spite of the key, says so, and goes online later."""
    monkeypatch.setenv("HPCGPT_TRACKING_PROBE_S", "1")
    server.mode = "failing"
    attempt = Attempt(tmp_path)
    attempt.write(range(1, 11))
    until(lambda: (attempt.folder / "events.jsonl").exists())
    assert server.wait(lambda: server.requests.count("/") >= 3), "it is asked again and again"
    assert len(list(attempt.folder.glob("wandb/offline-run-*"))) == 1, "each of which leaves no file"
    server.mode = "healthy"
    attempt.write(range(11, 21))
    assert server.wait(lambda: len(server.steps(attempt.id)) == 20)
    attempt.tracker.close(0, LONG_S)
    assert server.steps(attempt.id) == list(range(1, 21))
    assert "wandb: offline, because" in capfd.readouterr().err
    found = [event["words"] for event in run_folder.events(attempt.folder) if event["event"] == "wandb"]
    assert "the server does not answer" in found[0]


def test_sync_sends_what_is_missing_and_may_be_repeated(tmp_path: Path, server: WandbServer) -> None:
    offline = Attempt(tmp_path, "offline")
    offline.write(range(1, 11))
    offline.tracker.close(0, LONG_S)
    assert server.history == {}
    for _ in range(2):
        sync(offline.folder)
        assert server.steps(offline.id) == list(range(1, 11))


def test_the_process_of_an_older_attempt_exits_when_a_newer_one_has_the_folder(
    tmp_path: Path, server: WandbServer
) -> None:
    older = Attempt(tmp_path)
    child = older.wait_for_process()
    newer = Attempt(tmp_path)
    child.wait(60)
    older.tracker.close(1, 1.0)
    newer.write(range(1, 4))
    newer.tracker.close(0, LONG_S)
    assert server.steps(newer.id) == [1, 2, 3]


def test_stop_run_on_the_dashboard_creates_a_stop_file(tmp_path: Path, server: WandbServer) -> None:
    attempt = Attempt(tmp_path)
    attempt.write(range(1, 4))
    server.stop_asked = True
    until((attempt.folder / "STOP").exists)
    attempt.write(range(4, 6))
    attempt.tracker.close(75, LONG_S)
    assert server.steps(attempt.id) == [1, 2, 3, 4, 5]


# --- offline ---------------------------------------------------------------------------------------


def test_offline_parts_contain_each_row_once_whatever_is_killed(tmp_path: Path) -> None:
    """wandb's core gets a signal; then the whole attempt is killed; then the run resumes at step 20."""
    first = Attempt(tmp_path, "offline")
    first.write(range(1, 11))
    child = first.wait_for_process()
    until(lambda: list(first.folder.glob("wandb/offline-run-*/*.wandb")))
    until(lambda: sorted(steps_of(fragments(first.folder))) == list(range(1, 11)), 1.0)
    cores = children(child.pid)
    assert cores
    for pid in cores:
        os.kill(pid, signal.SIGTERM)
    first.write(range(11, 31))
    until(lambda: sorted(steps_of(fragments(first.folder))) == list(range(1, 31)), 1.0)
    first.write(range(31, 41))
    first.kill()
    last = Attempt(tmp_path, "offline", keep=20)
    last.write(range(21, 51))
    last.tracker.close(0, LONG_S)
    parts = fragments(last.folder)
    assert sorted(steps_of(parts)) == list(range(1, 51))
    ids = {record["run"]["run_id"] for part in parts for record in part if record["type"] == "run"}
    assert ids == {last.id}


def test_disabled_tracking_writes_nothing_but_the_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, variable in (("disabled", "online"), ("auto", "disabled")):
        monkeypatch.setenv("WANDB_MODE", variable)
        attempt = Attempt(tmp_path, option, name=f"{option}-{variable}")
        attempt.tracker.sample(2, "text")
        attempt.tracker.ranks(2, {"local_s": [0.1]})
        attempt.tracker.close(0, LONG_S)
        assert not (attempt.folder / "wandb").exists()
        assert not (attempt.folder / "ranks.jsonl").exists()
        samples = (attempt.folder / "samples.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in samples] == ["text"]


# --- training never waits --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["silent", "failing"])
def test_training_never_waits_for_a_broken_server_and_the_next_attempt_sends_everything(
    tiny: Path, tmp_path: Path, server: WandbServer, mode: Any
) -> None:
    """The server never answers, so anything that waits for it would hang: steps, SIGTERM and the end."""
    folder = tmp_path / "runs" / "tiny"
    server.mode = mode
    env = {key: value for key, value in clean_env().items() if key != "WANDB_MODE"}
    env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": os.environ["HOME"]}
    env |= {"HPCGPT_TRACKING_INIT_S": "100000"}  # wandb itself would give up after a while
    train = ("hpcgpt.train", str(tiny), "--tracking.wandb", "auto", "--checkpoint.every", "150", "--eval.every", "150")
    with Running(*train, "--train.steps", "100000", env=env) as training:
        until(lambda: (folder / "metrics.jsonl").exists() and len(rows(folder / "metrics.jsonl")) > 3)
        training.send_signal(signal.SIGSTOP)  # or it might end before wandb has sent anything
        assert server.wait(lambda: bool(server.requests))
        training.send_signal(signal.SIGTERM)
        training.send_signal(signal.SIGCONT)
        assert training.wait(120) == AGAIN, training.errors
    steps = len(rows(folder / "metrics.jsonl"))
    assert run_folder.read_exit(folder).status == AGAIN  # type: ignore[union-attr]
    assert steps < 300
    assert server.history == {}
    server.mode = "healthy"
    with Running(*train, "--train.steps", "300", env=env) as last:
        until(lambda: len(rows(folder / "metrics.jsonl")) > steps)
        last.send_signal(signal.SIGSTOP)  # on a busy machine wandb's start takes more than the 20 s at the end
        assert server.wait(lambda: "RunHistoryKeys" in server.requests)
        last.send_signal(signal.SIGCONT)
        assert last.wait(200) == FINISHED, last.errors
    assert server.steps(run_folder.run_id(folder)) == list(range(1, 301)), last.errors
