"""Asks wandb: its mode and key, and which lines of a run its server, or the .wandb files of an offline run, have.

Imports wandb where it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from hpcgpt.output.best_effort import limited
from hpcgpt.tracking.missing_rows import RunRows

# For each kind of line, the key that only its rows have at the server, and the keys by which it is identified.
MARKS = {
    "metrics.jsonl": "tokens",
    "samples.jsonl": "sample",
    "ranks.jsonl": "ranks/usual_s",
    "events.jsonl": "event/name",
}

STEPS_AT_A_TIME = 10_000  # that the server is asked for, wandb's own


@dataclass
class Arrived:
    """What the server has: wandb's own step of the next row, and of the first row that is obsolete (None: there is
    none)."""

    next_step: int = 0
    first_obsolete: int | None = None


def ask_wandb() -> tuple[str, str, bool]:
    """Return wandb's server, its mode, and whether it has a key for that server."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    key = wbauth.authenticate_session(host=settings.base_url, source="hpcgpt", prompt=False, update_session=False)
    return settings.base_url, settings.mode, key is not None


def address() -> tuple[str, dict[str, str]]:
    """Return wandb's server and its proxies by scheme."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    own = {"http": settings.http_proxy, "https": settings.https_proxy}
    return settings.base_url, getproxies() | {scheme: url for scheme, url in own.items() if url}


def choose_mode(wanted: str, why_offline: str) -> tuple[str, str]:
    """Return 'online', 'offline' or 'disabled', and the reason.

    `wanted` is tracking.wandb; wandb's own settings decide the rest. `why_offline`: why the server is not tried now.
    """
    if wanted == "offline":
        return "offline", ""
    try:
        host, mode, has_key = ask_wandb()
    except Exception as error:
        # wandb refuses its own settings. Without them the run can still be kept offline.
        for name in [name for name in os.environ if name.startswith("WANDB_") and "DIR" not in name]:
            del os.environ[name]
        return "offline", f"wandb does not accept its settings ({summary(error)})"
    if wanted == "auto" and mode == "disabled":
        return "disabled", "wandb's settings say so (WANDB_MODE, WANDB_DISABLED)"
    if wanted == "auto" and mode in ("offline", "dryrun"):
        return "offline", f"wandb's settings say mode {mode} (WANDB_MODE, or `wandb offline`)"
    if not has_key:
        return "offline", f"there is no key for {host} (`wandb login`)"
    if wanted == "auto" and why_offline:
        return "offline", f"{host}: {why_offline}"
    return "online", ""


def read_server(path: str, lines: RunRows, limit_s: float, from_step: int = 0) -> Arrived:
    """Note in `lines` what the server has of a run, from wandb's own step `from_step` on. `path` is the run's.

    Raises:
        TimeoutError: the server did not answer for `limit_s` seconds. All of a long run may take longer.
    """
    import wandb

    lines.read_events()
    run: Any = limited(limit_s, partial(wandb.Api(timeout=20).run, path))
    # Read once: rows that arrive meanwhile are beyond it for all four kinds.
    end = int(limited(limit_s, partial(getattr, run, "lastHistoryStep"))) + 1
    found = Arrived(max(from_step, end))
    for first in range(from_step, end, STEPS_AT_A_TIME):
        for name, mark in MARKS.items():
            most, attempts = min(end, first + STEPS_AT_A_TIME), dict[int, Any]()
            if name == "metrics.jsonl" and lines.goes_back:  # a key that not all rows have: those of older versions
                with_attempt = limited(limit_s, partial(_scan, run, ["_step", "attempt", mark], first, most))
                attempts = {int(row["_step"]): row["attempt"] for row in with_attempt}
            for row in limited(limit_s, partial(_scan, run, ["_step", "step", "time", mark], first, most)):
                step, made_at, own_step = int(row["step"]), float(row["time"]), int(row["_step"])
                if name != "events.jsonl" and lines.is_obsolete(step, made_at, attempts.get(own_step)):
                    before = found.first_obsolete
                    found.first_obsolete = own_step if before is None else min(own_step, before)
                else:
                    lines.note(name, step, made_at)
    return found


def _scan(run: Any, keys: list[str], first: int, end: int) -> list[dict[str, Any]]:
    """Read the rows of a run at the server that have all `keys`, of wandb's own steps from `first` to before `end`."""
    return list(run.scan_history(keys=keys, min_step=first, max_step=end, use_cache=False))


def offline_parts(folder: Path, run_id: str) -> list[Path]:
    """Return the offline runs with this id in one of wandb's folders: ``offline-run-<time>-<id>``."""
    return [path for path in folder.glob("offline-run-*-*") if path.name.split("-", 3)[3] == run_id]


def read_files(folder: Path, run_id: str, lines: RunRows) -> None:
    """Note in `lines` what the .wandb files of the offline runs with this id in `folder` have.

    If a row in them is obsolete, all of these files are removed, and nothing is noted: what is sent next is the whole
    run, in one file.

    Raises:
        OSError: wandb's own reader cannot read one of them.
    """
    lines.read_events()
    parts = offline_parts(folder, run_id)
    found = [line for part in parts for path in part.glob("*.wandb") for line in _history(path)]
    if any(name != "events.jsonl" and lines.is_obsolete(*made) for name, *made in found):
        for part in parts:
            shutil.rmtree(part)
        return
    for name, step, made_at, _ in found:
        lines.note(name, step, made_at)


def _history(path: Path) -> Iterator[tuple[str, int, float, Any]]:
    """Yield file, step, time and attempt (None: unknown) of the lines that a .wandb file has, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    ) as read:
        assert read.stdout is not None and read.stderr is not None
        for text in read.stdout:
            with suppress(ValueError, KeyError, TypeError):
                item = dict(json.loads(text)["history"]["item"])
                names = [name for name, mark in MARKS.items() if mark in item]
                if names and isinstance(item.get("step"), int) and isinstance(item.get("time"), int | float):
                    yield names[0], item["step"], item["time"], item.get("attempt")
        problem = read.stderr.read()
    if read.returncode:
        raise OSError(f"wandb cannot read {path}: {' '.join(problem.split())[:200]}")


def summary(error: BaseException) -> str:
    """Return an exception as a line of at most 200 characters and its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
