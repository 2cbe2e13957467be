"""hpcgpt.doctor.network: is Weights & Biases reachable, also through a proxy; only on loopback here."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from hpcgpt.doctor import network


class Server(HTTPServer):
    """Answers every request with `status`, and keeps the request lines."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.lines = status, list[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.server.lines.append(f"{self.requestline} {self.headers.get('Content-Length')}")
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(status: int) -> Iterator[Server]:
    with Server(status) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY", "WANDB_MODE",
                 "WANDB_API_KEY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.parametrize("status", [200, 404])
def test_any_answer_of_the_server_is_enough_and_nothing_is_sent(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with serving(status) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        (found,) = network.wandb("online")
        assert (found.level, found.found) == ("ok", f"{server.url} answers (status {status})")
        assert server.lines == ["HEAD /healthz HTTP/1.1 None"]


def test_a_missing_key_is_bad_only_if_wandb_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(200) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        assert [finding.level for finding in network.wandb("online")] == ["ok", "bad"]
        assert [finding.level for finding in network.wandb("auto")] == ["ok", "warning"]
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
        assert [finding.level for finding in network.wandb("online")] == ["ok"]


def test_a_user_without_a_home_folder_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with --user 12345 without an entry in its passwd."""
    for name in ("NETRC", "HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    with serving(200) as server:
        assert [finding.level for finding in network.wandb("online", server.url)] == ["ok", "bad"]


@pytest.mark.processes
def test_the_server_is_the_one_of_wandbs_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb login --host` writes it into this file."""
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with serving(200) as server:
        (tmp_path / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
        (found,) = network.wandb("online")
        assert (found.level, server.url in found.found, len(server.lines)) == ("ok", True, 1)


def test_the_proxy_is_used_and_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_BASE_URL", "http://api.wandb.invalid")
    with serving(200) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:secret@"))
        (found,) = network.wandb("online")
        assert proxy.lines == ["HEAD http://api.wandb.invalid/healthz HTTP/1.1 None"]
        assert found.found == f"http://api.wandb.invalid answers through 127.0.0.1:{proxy.server_port} (status 200)"
        proxy.status = 503
        (found,) = network.wandb("online")
        assert (found.level, "the proxy refuses" in found.found) == ("bad", True)


def test_no_answer_is_bad_only_if_wandb_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: it refuses, and no other program gets the port
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        (found,) = network.wandb("online")
        assert (found.level, "Connection refused" in found.found) == ("bad", True)
        assert "hpcgpt tracking sync RUN" in found.advice
        assert network.wandb("auto")[0].level == "warning"


@pytest.mark.parametrize(("mode", "variable"), [("disabled", ""), ("offline", ""), ("auto", "disabled")])
def test_without_wandb_nothing_is_asked(mode: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert [finding.level for finding in network.wandb(mode)] == ["ok"]
