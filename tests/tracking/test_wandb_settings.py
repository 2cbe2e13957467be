"""What the tracker takes from wandb's own settings: the key, the server, a proxy, the mode."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.tracking.tracker import check
from tests.tracking.attempts import KEY, LONG_S, Attempt, fragments, home, server, steps_of
from tests.tracking.connect_proxy import ConnectProxy

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

__all__ = ["home", "server"]  # fixtures


def one_row(tmp_path: Path, mode: str = "auto") -> Attempt:
    attempt = Attempt(tmp_path, mode)
    attempt.write(range(1, 2))
    attempt.tracker.close(0, LONG_S)
    return attempt


def netrc(home: Path, machine: str, mode: int) -> None:
    (home / ".netrc").write_text(f"machine {machine} login user password {KEY}\n")
    (home / ".netrc").chmod(mode)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_key_in_a_netrc_of_any_file_mode_counts(
    tmp_path: Path, server: WandbServer, home: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc(home, server.url.removeprefix("http://"), mode)
    assert server.steps(one_row(tmp_path).id) == [1]
    check("online")


def test_a_key_for_wandbs_default_host_counts(home: Path) -> None:
    """Without WANDB_BASE_URL; the key is stored as by `wandb login`. Nothing is sent there."""
    with pytest.raises(UserError, match="there is no key"):
        check("online")
    login = "import wandb\nfrom wandb.sdk.lib import wbauth\n"
    login += f"wbauth.write_netrc_auth(host=wandb.Settings().base_url, api_key='{KEY}')"
    subprocess.run([sys.executable, "-c", login], check=True, capture_output=True)
    assert (home / ".netrc").exists()
    check("online")


def test_the_server_may_be_set_in_wandbs_settings_file(
    tmp_path: Path, server: WandbServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL")
    (home / ".config/wandb").mkdir(parents=True)
    (home / ".config/wandb/settings").write_text(f"[default]\nbase_url = {server.url}\n")
    assert server.steps(one_row(tmp_path).id) == [1]


def test_the_server_may_be_reached_through_a_proxy(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name does not resolve: what arrives came through the proxy, which is the server itself."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.invalid")
    monkeypatch.setenv("HTTP_PROXY", server.url)
    assert server.steps(one_row(tmp_path).id) == [1]


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate of the proxy")
def test_a_proxy_for_https_only_is_used(tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy only gets requests for tunnels to the server, whose name does not resolve."""
    proxy = ConnectProxy(tmp_path, "wandb.invalid", server.url)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("SSL_CERT_FILE", str(proxy.certificate))
    assert server.steps(one_row(tmp_path).id) == [1]
    assert proxy.tunnels == {"wandb.invalid:443"}
    proxy.close()


def test_a_server_in_no_proxy_is_contacted_directly(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.0.0.0 is this host, but no loopback address for wandb's core, which never uses a proxy for those."""
    proxy = WandbServer()
    monkeypatch.setenv("WANDB_BASE_URL", server.url.replace("127.0.0.1", "0.0.0.0"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "0.0.0.0")
    assert server.steps(one_row(tmp_path).id) == [1]
    assert proxy.requests == []
    monkeypatch.delenv("NO_PROXY")
    one_row(tmp_path / "proxied")
    assert proxy.requests != []
    proxy.close()


@pytest.mark.parametrize(
    ("variables", "settings", "reason"),
    [
        ({"WANDB_MODE": "offline"}, "", "wandb's settings say mode offline"),
        ({"WANDB_MODE": "dryrun"}, "", "wandb's settings say mode"),
        ({}, "mode = offline", "wandb's settings say mode offline"),
        ({"WANDB_API_KEY": ""}, "", "there is no key for http://127.0.0.1:"),
        ({"WANDB_BASE_URL": "http://localhost:99999"}, "", "wandb does not accept its settings"),
    ],
    ids=["offline", "dryrun", "wandb-offline", "no-key", "bad-port"],
)
def test_offline_mode_is_respected_and_its_reason_printed_and_recorded(
    tmp_path: Path, server: WandbServer, home: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str], variables: dict[str, str], settings: str, reason: str,
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if settings:
        (home / ".config/wandb").mkdir(parents=True)
        (home / ".config/wandb/settings").write_text(f"[default]\n{settings}\n")
    attempt = one_row(tmp_path)
    assert server.history == {}
    assert steps_of(fragments(attempt.folder)) == [1]
    output = capfd.readouterr().err
    assert f"wandb: offline, because {reason}" in output
    assert f"`python -m hpcgpt.tracking sync {attempt.folder}` later" in output
    (event,) = (event for event in run_folder.events(attempt.folder) if event["event"] == "wandb")
    assert reason in event["words"]


def test_online_without_a_key_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there is no key: run `wandb login`, or use offline"):
        check("online")
    for option in ("auto", "offline", "disabled"):
        check(option)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    check("online")
