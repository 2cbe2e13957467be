"""``hpcgpt tracking``: send a run to Weights & Biases, and make the dashboard that shows it."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.config import paths, sources
from hpcgpt.config.operation import Tracking
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FAILED
from hpcgpt.output import streams
from hpcgpt.run import run_folder, which_runs
from hpcgpt.storage import lease
from hpcgpt.tracking import arrived, tracker

SYNC_S = 3600.0
RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt tracking", description="Send runs to Weights & Biases.")
    actions = parser.add_subparsers(dest="action", required=True)
    sync = actions.add_parser(
        "sync", help="send what the server does not have of a run",
        description="Send what the server does not have of a run: rows, events and samples, of the run folder. It may "
        "be repeated.",
    )  # fmt: skip
    which_runs.add_to(sync)
    where = sync.add_mutually_exclusive_group()
    where.add_argument("--offline", metavar="DIR", help="send nothing: make one folder for `wandb sync`")
    where.add_argument(
        "--copy", type=paths.not_empty, metavar="ID", help="send the whole run under another id, as a new wandb run"
    )
    sync.add_argument(
        "--within", type=float, default=SYNC_S, metavar="SECONDS", help="give up after (default: %(default).0f)"
    )
    board = actions.add_parser(
        "dashboard", help="make the dashboard of a project",
        description="Make the dashboard of a project, a saved view of its workspace: loss by tokens, throughput, "
        "goodput and restarts, gradients, ranks and nodes, samples.",
    )  # fmt: skip
    board.add_argument("--project", default=Tracking.project, help="default: %(default)s")
    board.add_argument("--entity", default="", help="user or team; default: that of the key")
    board.add_argument("--name", default="hpcgpt", help="of the view; default: %(default)s")
    board.add_argument("--json", action="store_true", help="send nothing: print what would be sent")
    given = parser.parse_args(argv)
    if given.action == "dashboard":
        return _make_dashboard(given.project, given.entity, given.name, given.json)
    offline = None if given.offline is None else Path(paths.expand(given.offline, "--offline"))
    return _sync(which_runs.given(given), offline, given.copy, given.within)


def _sync(folder: Path, offline: Path | None, copy: str | None, limit_s: float) -> int:
    """Run the process that sends a run, if no other `sync` does; return the exit status."""
    sources.from_file(folder / "config.toml")  # refused here, and not for as long as it is tried
    if offline is None:
        original = None if copy else run_folder.original_of(folder)
        if original and _has_own_events(folder, original):
            raise UserError(
                f"{folder} is a copy of {original} and still has its id, so what has happened in it since would change "
                "that run at W&B: train it, which gives it an id of its own, or send it under another one: --copy ID"
            )
        _refuse_running(folder)
        if copy and not RUN_ID.fullmatch(copy):
            raise UserError(f"--copy '{copy}': an id has letters, digits, - and _, at most 64")
        _need_key(f"make a folder for `wandb sync`: hpcgpt tracking sync {folder} --offline DIR")
    with _alone(offline or folder) as lock:
        return _sync_alone(folder, offline, copy, limit_s, lock)


def _has_own_events(copy: Path, original: Path) -> bool:
    """Has the copy events that the original has not, as of `hpcgpt checkpoint back`?"""
    try:
        own = (copy / "events.jsonl").read_bytes()
        with open(original / "events.jsonl", "rb") as file:
            return file.read(len(own)) != own
    except FileNotFoundError:
        return (copy / "events.jsonl").exists()


def _sync_alone(folder: Path, offline: Path | None, copy: str | None, limit_s: float, lock: tuple[int, ...]) -> int:
    ended = run_folder.read_exit(folder)
    state: dict[str, Any] = {"finish": [ended.status if ended else 1, time.time() + limit_s], "sync": True}
    generation = 0
    if offline:
        if list(offline.glob("wandb/offline-run-*")):
            raise UserError(f"{offline} has a run already: choose another folder, or remove {offline / 'wandb'}")
        state["into"] = str(offline.absolute())
    else:
        state["run_id"] = copy or ""
        generation = lease.newest_number(folder)  # if a newer attempt starts, it sends the rest
    command = [sys.executable, "-m", "hpcgpt.tracking.wandb_process", str(folder), "online", str(generation)]
    env = {**os.environ, tracker.STATE: json.dumps(state)}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, check=False, pass_fds=lock)
    if done.returncode:
        # The process ends without a word at its deadline and when a newer attempt has started.
        if generation and lease.newest_number(folder) > generation:
            why = "a newer attempt has started, whose own process sends the rest"
        elif time.time() > state["finish"][1]:
            why = f"it takes longer than {limit_s:,.0f} s: repeat the command, which continues, or raise --within"
        else:
            why = f"the process that sends it ended with status {done.returncode}"
        return cli.print_error(RuntimeError(f"{folder}: not everything is sent: {why}"), FAILED)
    if offline:
        made = max(arrived.offline_parts(offline / "wandb", run_folder.run_id(folder)))
        print(f"made {made}; where there is a network: wandb sync {made}")
    return 0


def _make_dashboard(project: str, entity: str, name: str, as_json: bool) -> int:
    from hpcgpt.tracking import dashboard

    if as_json:
        print(dashboard.spec(entity or "ENTITY", project, name))
        return 0
    _need_key("see what would be sent: --json")
    try:
        print(dashboard.save(entity, project, name))
    except UserError:
        raise
    except Exception as error:  # of a library, and of a server that may answer anything
        raise UserError(f"the dashboard was not made: {' '.join(str(error).split())[:300]}") from None
    return 0


def _need_key(otherwise: str) -> None:
    """Raise UserError if wandb has no key; `otherwise` is what works without one."""
    try:
        tracker.check("online")
    except UserError:
        raise UserError(f"this needs a key of Weights & Biases: run `wandb login`. Without one, {otherwise}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[tuple[int, ...]]:
    """Lock the wandb folder in `folder`; yield the descriptor of the lock, for the process that sends.

    Nothing is locked, and yielded, in a folder that this user may only read, from which wandb can still send.

    The lock belongs to both processes, so it is held until the last one ends, however it ends. On a file system without
    locks, or with locks of each host alone, a second one is not noticed.

    Raises:
        UserError: another `hpcgpt tracking sync` has locked it.
        OSError: no file can be made in it, as on a full disk.
    """
    try:
        (folder / "wandb").mkdir(parents=True, exist_ok=True)
        file = open(folder / "wandb" / "sync.lock", "ab")  # noqa: SIM115
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield ()
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another `hpcgpt tracking sync` is sending it, or writing there: wait until it has ended"
            ) from None
        except OSError:
            pass
        yield (file.fileno(),)


def _refuse_running(folder: Path) -> None:
    """Raise UserError if the run is being trained. Of a holder on another host that takes seconds to find out."""
    try:
        lease.wait_until_gone(folder, "")
    except lease.HeldError:
        raise UserError(
            f"{folder} is being trained, and its own process sends what is missing: wait until it has ended, or make a "
            f"folder for `wandb sync` now: hpcgpt tracking sync {folder} --offline DIR"
        ) from None


if __name__ == "__main__":
    cli.run(main)
