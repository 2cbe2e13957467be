"""Which attempts could not read a checkpoint: their events ``unreadable``, recorded and counted.

A host at fault must not cost a run its checkpoint, and a bad block must not end the run. So it takes several attempts
until one that cannot be read is set aside (hpcgpt.checkpoint.load). No torch in here.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt import errors
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder
from hpcgpt.storage.lease import Lease

FAILED_ATTEMPTS = 2  # earlier ones that could not read a checkpoint, on any host, until it is set aside


@dataclass(frozen=True)
class Unreadable:
    """A file that a rank could not read, and why."""

    rank: int
    host: str
    errno: int
    reason: str
    file: str

    @property
    def message(self) -> str:
        return f"{self.file}: {self.reason}"

    @property
    def error(self) -> OSError:
        error = OSError(self.errno, self.reason, self.file)
        errors.mark(error, self.rank)
        return error


def failed_before(run: Path, step: int, identity: str, now: Unreadable, lease: Lease) -> str:
    """Record that the checkpoint of a step cannot be read; return which earlier attempts could not either, if enough,
    or ''.

    `identity` distinguishes it from others of the same step; '' if it is not known.
    """
    found: list[dict[str, Any]] = []
    for event in run_folder.events(run):
        if event.get("step") != step:
            continue
        if event.get("event") == "save" or event.get("set_aside"):
            found = []  # earlier events are about one that was replaced, or restored, since
        # If its identity is not known, its step is enough: a disk that cannot be read must not block the run.
        elif (
            event.get("event") == "unreadable"
            and event.get("attempt") != lease.number
            and (not identity or event.get("identity", "") in ("", identity))
        ):
            found.append(event)
    hosts = {str(event.get("host")) for event in found}
    enough = len({event.get("attempt") for event in found}) >= FAILED_ATTEMPTS or bool(hosts - {now.host})
    with suppress(OSError):  # if it is not recorded, the next failure counts as the first
        run_folder.record(
            run, "unreadable", attempt=lease.number, step=step, rank=now.rank, host=now.host, problem=now.message,
            identity=identity, set_aside=enough,
        )  # fmt: skip
    return f"{counted(len(found), 'earlier attempt')} on {', '.join(sorted(hosts))}" if enough else ""
