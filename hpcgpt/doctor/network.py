"""Checks whether Weights & Biases can be reached, also through a proxy. It only asks: nothing is sent but a request.

No torch and no wandb in here: wandb's settings are read by another process.
"""

from __future__ import annotations

import netrc
import os
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from hpcgpt.doctor.findings import Finding, bad, ok, warning
from hpcgpt.tracking import tracker

TIMEOUT_S = 6.0


def wandb(mode: str, server: str = "") -> list[Finding]:
    """Check server and key; `mode` is tracking.wandb. What is missing is bad only if it is "online".

    `server`: its address; "": the one that wandb would use here.
    """
    mode = _in_effect(mode)
    if mode in ("disabled", "offline"):
        return [ok("wandb", f"{mode}: no network is needed while training")]
    level = bad if needed(mode) else warning
    try:
        server = server or server_of_wandb()
    except (OSError, subprocess.SubprocessError) as error:
        return [level("wandb", f"wandb does not say which server it uses: {error}", "its address", "`wandb status`")]
    advice = "tracking.wandb offline keeps the rows in the run folder; `hpcgpt tracking sync RUN` sends them later"
    problem, seen = _ask(server)
    if problem:
        proxy = "" if _proxy(server) else "; if there is a proxy, export https_proxy"
        return [level("wandb", f"{server}: {problem}", "an answer", f"{advice}{proxy}")]
    found = [ok("wandb", seen)]
    if not _has_key(urlsplit(server).hostname or ""):
        found.append(level("wandb key", f"no key for {server}", "WANDB_API_KEY, or one in ~/.netrc", "`wandb login`"))
    return found


def server_of_wandb() -> str:
    """Return the address of the server that wandb uses: WANDB_BASE_URL, its settings files, or its own default.

    Raises:
        OSError, SubprocessError: wandb cannot be asked.
    """
    if named := os.environ.get("WANDB_BASE_URL"):
        return named.rstrip("/")
    return tracker.server_and_key()[0].rstrip("/")


def server_for_nodes(mode: str) -> str:
    """Return the address for `wandb` on the nodes of a job, which have less time; "" if there is none to check."""
    with suppress(OSError, subprocess.SubprocessError):
        return "" if _in_effect(mode) in ("disabled", "offline") else server_of_wandb()
    return ""


def needed(mode: str) -> bool:
    """Return whether a run needs the server; `mode` is tracking.wandb."""
    return _in_effect(mode) == "online"


def _in_effect(mode: str) -> str:
    return os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode


def _ask(server: str) -> tuple[str, str]:
    """Return why the server cannot be reached, or '' and how it answered. Any answer of HTTP is one."""
    via = f" through {proxy}" if (proxy := _proxy(server)) else ""
    try:
        request = urllib.request.Request(f"{server}/healthz", method="HEAD")
        # urlopen keeps the proxies of its first call in a process.
        with urllib.request.build_opener().open(request, timeout=TIMEOUT_S) as answer:
            return "", f"{server} answers{via} (status {answer.status})"
    except urllib.error.HTTPError as error:
        if error.code in (407, 502, 503, 504) and via:
            return f"the proxy refuses{via} (status {error.code})", ""
        return "", f"{server} answers{via} (status {error.code})"
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return f"no answer{via}: {' '.join(str(reason).split())}", ""


def _proxy(server: str) -> str:
    """Return the proxy for a server, from https_proxy and no_proxy, without a password that is in it."""
    parts = urlsplit(server)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return ""
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    return proxy.rpartition("@")[2] if proxy else ""


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: this user has no home folder
        path = os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())
        return netrc.netrc(path).authenticators(host) is not None
    return False
