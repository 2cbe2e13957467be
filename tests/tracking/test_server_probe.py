"""hpcgpt.tracking.server_probe: what counts as an answer, and when a run is opened at the server again."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcgpt.drill.wandb_server import Mode, WandbServer
from hpcgpt.tracking import arrived, server_probe
from hpcgpt.tracking.server_probe import ServerProbe
from hpcgpt.tracking.wandb_process import State
from tests.programs import ROOT
from tests.tracking.attempts import home, server
from tests.tracking.connect_proxy import ConnectProxy

__all__ = ["home", "server"]  # fixtures


@pytest.mark.processes
@pytest.mark.usefixtures("home")
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate of the proxy")
def test_whether_the_server_answers_is_asked_through_its_proxy_and_without_a_key(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name does not resolve. That its certificate is not trusted here does not matter: it answers."""
    proxy = ConnectProxy(tmp_path, "wandb.invalid", server.url)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    code = "from hpcgpt.tracking import arrived, server_probe\n"
    code += "while input() == 'ask': print(server_probe.answers(*arrived.address(), 1.0), flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          cwd=ROOT) as asking:  # fmt: skip
        assert asking.stdin is not None
        assert asking.stdout is not None
        found = []
        modes: tuple[Mode, ...] = ("healthy", "failing", "silent", "refusing", "healthy")
        for mode in modes:
            server.mode = mode
            print("ask", file=asking.stdin, flush=True)
            found.append(asking.stdout.readline().strip())
        print("end", file=asking.stdin, flush=True)
    proxy.close()
    assert found == ["True", "False", "False", "False", "True"]
    assert server.authorizations == {""}


@pytest.mark.parametrize(
    ("status", "expected"), [(302, True), (401, True), (404, True), (500, False), (503, False), (None, False)]
)
def test_any_status_but_a_failure_is_an_answer(status: int | None, expected: bool) -> None:
    """A redirect is not followed: its target is closed to a compute node."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            if status is not None:  # else the connection is closed without an answer
                self.send_response(status)
                self.send_header("Location", "http://127.0.0.1:1/")
                self.end_headers()

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.timeout = 30  # the end of the thread if nothing is asked
    thread = threading.Thread(target=http.handle_request)
    thread.start()
    found = server_probe.answers(f"http://127.0.0.1:{http.server_port}", {}, 10.0)
    thread.join()
    http.server_close()
    assert found == expected


def test_a_server_behind_a_proxy_that_only_wandb_can_use_is_not_taken_for_silent() -> None:
    assert server_probe.answers("https://wandb.invalid", {"https": "socks5://127.0.0.1:1"}, 1.0)
    assert not server_probe.answers("http://wandb.invalid", {"https": "socks5://127.0.0.1:1"}, 1.0)


class Immediate:
    """A thread that has ended when it has been started."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool) -> None:
        self._run = partial(target, *args)
        assert daemon, "it must not keep the process from ending"

    def start(self) -> None:
        self._run()


def openings(
    monkeypatch: pytest.MonkeyPatch, answers: Callable[[float], bool], hours: float
) -> tuple[list[int], State]:
    """Return the seconds at which a run is opened within some hours, if each time that fails; and the state then.

    `answers`: is there an answer, so many seconds after the beginning?
    """
    now = [1000.0]
    monkeypatch.setattr(server_probe, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(server_probe, "threading", SimpleNamespace(Event=threading.Event, Thread=Immediate))
    monkeypatch.setattr(arrived, "address", lambda: ("http://wandb.invalid", {}))
    monkeypatch.setattr(server_probe, "answers", lambda *_: answers(now[0] - 1000.0))
    state, opened = State(), []
    probe = ServerProbe(state)
    for second in range(int(hours * 3600)):
        now[0] += 1
        if probe.should_open():
            opened.append(second)
            probe = ServerProbe(state)  # the process is replaced
    return opened, state


def test_after_answers_a_run_is_opened_three_times_and_then_once_in_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may answer in place of the server: a page to log in at, a proxy that refuses."""
    opened, _ = openings(monkeypatch, lambda _: True, hours=3.5)
    assert len(opened) == 6
    assert opened[0] < 60
    assert opened[2] < 900
    assert opened[4] - opened[3] == opened[5] - opened[4] == 3600


def test_without_an_answer_a_run_is_opened_once_in_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, state = openings(monkeypatch, lambda _: False, hours=3.5)
    assert opened == [3599, 7199, 10799]
    assert state.probes > 30


def test_an_answer_after_a_long_silence_opens_the_run_within_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if other answers, to which it could not be opened, were followed by the silence."""
    opened, _ = openings(monkeypatch, lambda second: second < 1800 or second > 16_000, hours=6)
    assert len([second for second in opened if second < 1800]) == 3
    assert next(second for second in opened if second > 16_000) < 16_360
