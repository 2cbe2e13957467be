"""The run folder: what it contains, and its small files. Everything else about a run is derived from it.

::

    runs/<name>/
      config.toml          the resolved configuration, of the newest attempt
      configs/             see keep_config
      run.json             the run's id (also wandb's), made once; a copy of the folder gets another one
      metrics.jsonl        see hpcgpt.run.metrics_file
      samples.jsonl        one JSON object for each generated text: step, time, text
      ranks.jsonl          times of all ranks, figures of all nodes: see hpcgpt.training.stragglers
      events.jsonl         one JSON object a line: time, event, attempt, and the fields of the event
      exit.json            how the newest attempt ended: written by rank 0, read by hpcgpt.requeue
      checkpoints/         see hpcgpt.checkpoint
      faults/              see hpcgpt.run.crash_report
      generations/         see hpcgpt.storage.lease
      rendezvous/          see hpcgpt.distributed.rendezvous
      verified.json        see hpcgpt.data.shard_check
      tokenizer/           a copy of the shards' tokenizer
      logs/                one file for each start of a job
      wandb/
      tensorboard/

A folder of imported weights has config.toml, run.json, checkpoints/, tokenizer/ and imported.json, which says where
they come from (hpcgpt.import_weights); no attempt trains there.

A file named STOP in it makes a running job save and exit, and keeps other jobs from starting.

No torch in here.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import secrets
import socket
import string
import threading
import time
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpcgpt.distributed import world
from hpcgpt.distributed.stop_signals import Stop
from hpcgpt.errors import NodeError, UserError, cannot_read, sentence
from hpcgpt.output import streams
from hpcgpt.output.best_effort import limited
from hpcgpt.storage import atomic

IMPORTED = "imported.json"
LOOK_S = 10.0  # that the file system of another run folder may take to answer
_APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT
_recording = threading.Lock()  # truncating a line that did not fit must not remove another thread's line


@dataclass(frozen=True)
class Exit:
    """How an attempt ended. `attempt` is world.job_start; `reason` is a message, and `stop` its code if it saved."""

    attempt: str
    status: int
    reason: str
    step: int
    saved: bool

    @property
    def stop(self) -> Stop:
        return Stop.from_message(self.reason)


def prepare(folder: Path) -> str:
    """Make the folder and its run.json unless they exist; return the run's id.

    Raises:
        UserError: the folder cannot be made, or cannot be written to.
        NodeError: the same on a later start of a Slurm job: its first start could use the folder.
    """
    try:
        for name in ("checkpoints", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # Check each that exists: another user may have made the run, or root a part of it.
        for path in (folder, *(folder / name for name in ("checkpoints", "logs", "generations"))):
            if path.exists():
                _try_to_write(path)
        atomic.create(folder / "run.json", _new_identity())
    except OSError as error:
        why = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        problem = f"{folder} cannot be a run folder: {why}"
        if world.job_start().rpartition("_")[2] not in ("", "0"):
            raise NodeError(
                error.errno, f"{problem}; it was one before: does this node have its file system?"
            ) from None
        raise cannot_read(error, f"{problem}: choose a folder that you may write to, with --run.dir") from None
    return run_id(folder)


def _new_identity(**more: str) -> bytes:
    """Return the content of a run.json."""
    letters = string.ascii_lowercase + string.digits
    made = {"id": "".join(secrets.choice(letters) for _ in range(10)), "created": time.time(), **more}
    return (json.dumps(made) + "\n").encode()


def original_of(folder: Path) -> Path | None:
    """Return the run folder that `folder` is a copy of: its config.toml names another one, which has the same id.

    A folder that was moved or renamed is no copy: there is no other one then. A warning is printed if it cannot be
    known, as where another file system does not answer.
    """
    try:
        return limited(LOOK_S, partial(_copied_from, folder))
    except OSError as error:
        streams.warn(
            f"cannot tell whether {folder} is a copy of another run ({sentence(error)}); if it is, both send their "
            "rows to one run at W&B"
        )
        return None


def _copied_from(folder: Path) -> Path | None:
    probe = folder / f".{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.probe"
    try:
        run = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["run"]
        named = Path(run["dir"]) / run["name"]
        if named.samefile(folder) or run_id(named) != run_id(folder):
            return None
        probe.touch()
        try:  # one folder may be seen at two places
            return None if (named / probe.name).exists() else named
        finally:
            probe.unlink()
    except (FileNotFoundError, NotADirectoryError, UserError, KeyError, TypeError, ValueError):
        return None


def separate(folder: Path) -> str:
    """Give a copy of a run an id of its own, or both would send their rows to one run at W&B; return a message.

    Return '' if the folder is no copy.

    Raises:
        OSError: run.json cannot be written.
    """
    original = original_of(folder)
    if original is None:
        return ""
    before = run_id(folder)
    atomic.write(folder / "run.json", _new_identity(copied_from=str(original), copied_id=before))
    return (
        f"{folder} is a copy of {original}, which still exists: it is a run of its own at W&B from here on, "
        f"{run_id(folder)}, not {before}. To continue that one instead: docs/continue.md"
    )


def rotate_records(folder: Path, attempt: str) -> None:
    """Rename the records that an earlier start with the same name left, so that they are not taken for this one's.

    `attempt` is world.job_start. Two starts in one allocation of salloc have the same name, and so have two jobs with
    the same id, where Slurm's ids began at 1 again. exit.json is removed, the others get a number after their names.
    """
    ended = read_exit(folder)
    try:
        if ended and ended.attempt == attempt:
            (folder / "exit.json").unlink()
        for path in (folder / "logs" / f"{attempt}.srun", folder / "faults" / attempt):
            if path.exists():
                path.rename(
                    next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{n}")).exists())
                )
    except OSError as error:  # training can continue without this
        streams.warn(error)


def _try_to_write(folder: Path) -> None:
    """Raise OSError if this user may not make files in `folder`; a full or failing disk is detected elsewhere."""
    probe = folder / f".{socket.gethostname()}-{os.getpid()}.probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
    with suppress(OSError):
        probe.unlink()


def run_id(folder: Path) -> str:
    path = folder / "run.json"
    try:
        return str(json.loads(path.read_bytes())["id"])
    except OSError as error:
        raise cannot_read(error, f"no run in {folder}: {error.strerror} ({path.name})") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def keep_config(folder: Path, attempt: int, text: str) -> bool:
    """Write `text` to the run's config.toml, and, if it differs from the one before, to ``configs/<attempt>.toml``.

    So the configuration of an attempt is the file with the highest number up to its own; number 0 is the config.toml of
    a version that had no such folder. If the disk has no room, print a warning and return False, so that the caller can
    try again: training does not read these files.
    """
    path, earlier = folder / "config.toml", folder / "configs"
    try:
        try:
            before = path.read_bytes()
        except FileNotFoundError:
            before = None
        if before == text.encode():
            return True
        if before is not None and not earlier.is_dir():
            earlier.mkdir()
            atomic.write(earlier / f"{0:06d}.toml", before)
        earlier.mkdir(exist_ok=True)
        atomic.write(earlier / f"{attempt:06d}.toml", text.encode())
        atomic.write(path, text.encode())
    except OSError as error:
        streams.warn(error)
        return False
    return True


def has_trained(folder: Path) -> bool:
    """Has any attempt of this run made a step?"""
    try:
        return (folder / "metrics.jsonl").stat().st_size > 0
    except OSError:
        return False


def record(folder: Path, event: str, **fields: Any) -> None:
    """Append one event.

    Raises:
        OSError: see `append_line`.
    """
    append_line(folder / "events.jsonl", {"time": time.time(), "event": event, **fields})


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Append a JSON object to a file, by one call, so that the lines of several writers on a host never mix.

    Raises:
        OSError: there is no room for it, or the file belongs to another user; no part of the line remains.
    """
    line = json.dumps(fields).encode() + b"\n"
    with _recording:
        try:
            descriptor = os.open(path, _APPENDING, 0o666)  # less the umask: a group may share a run
        except PermissionError as error:
            raise PermissionError(error.errno, _other_owner(path)) from None
        try:
            end = os.fstat(descriptor).st_size
            if end and os.pread(descriptor, 1, end - 1) != b"\n":
                line = b"\n" + line  # a crash truncated the line before
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise atomic.with_path_and_free_space(error, path) from error
        finally:
            os.close(descriptor)


def why_events_unwritable(folder: Path) -> str:
    """Return why this user may not append to events.jsonl, and what to do; '' if they may."""
    path = folder / "events.jsonl"
    try:
        os.close(os.open(path, _APPENDING, 0o666))
    except PermissionError:
        return _other_owner(path)
    except OSError:  # such as a full disk: reported when something is written
        return ""
    return ""


def _other_owner(path: Path) -> str:
    """Return the message on a file that belongs to another user."""
    existing = path if path.exists() else path.parent
    try:
        owner = f"user {existing.stat().st_uid}, not by user {os.geteuid()}"
    except OSError:
        owner = f"not by user {os.geteuid()}"
    return (
        f"{path} may be written by {owner}: nothing of this start is recorded, and crashes are not counted. Its owner "
        f"can share it: chmod g+rw {path}, and `umask 002` in the job script; or choose a folder of your own with "
        "--run.dir"
    )


def events(folder: Path) -> list[dict[str, Any]]:
    """Read the events. Lines that a crash truncated are left out."""
    return read_rows(folder / "events.jsonl", torn=True)


def read_rows(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Read the JSON objects of a .jsonl file, without an incomplete last line; [] if there is no file.

    Raises:
        ValueError: a line before the last one is not a JSON object; with `torn` it is left out instead.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError
            rows.append(row)
        except (ValueError, RecursionError):
            if number < len(lines) - 1 and not torn:
                raise ValueError(f"{path}, line {number + 1} is damaged: {line[:80]!r}") from None
    return rows


def write_exit(folder: Path, ended: Exit) -> None:
    atomic.write(folder / "exit.json", (json.dumps(asdict(ended)) + "\n").encode())


def read_exit(folder: Path) -> Exit | None:
    """Read how the newest attempt that wrote exit.json ended; None if there is none."""
    try:
        return Exit(**json.loads((folder / "exit.json").read_bytes()))
    except (OSError, TypeError, ValueError, RecursionError):
        return None
