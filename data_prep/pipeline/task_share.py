"""Divide the units among tasks: task i of n makes units i, i+n, i+2n, ...

A task acquires a lease (``hpcgpt.storage.lease``) on its share first, so that two runs into one folder do not do the
same work twice. That would only waste time: the content of a unit depends on the plan alone, and its folder appears
once. Shares i of n and j of m overlap if i = j modulo the greatest common divisor of n and m.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from hpcgpt.distributed import world
from hpcgpt.errors import UserError
from hpcgpt.storage import lease

REMEDY = "wait until it has finished, or end it first"
_NAME = re.compile(r"(\d+)_of_(\d+)")


@dataclass(frozen=True)
class TaskShare:
    """The units that task `task` of `tasks` makes."""

    task: int
    tasks: int

    def overlaps(self, other: TaskShare) -> bool:
        return (self.task - other.task) % gcd(self.tasks, other.tasks) == 0


@contextmanager
def acquire(out: Path, share: TaskShare) -> Iterator[None]:
    """Hold the lease on a share of the folder `out` while the block runs.

    Raises:
        UserError: a living process holds this share or one that overlaps with it.
    """
    folder = out / "prep" / "shares"
    attempt = world.job_start()
    try:
        task_lease = lease.acquire(folder / f"{share.task:04d}_of_{share.tasks:04d}", attempt, REMEDY)
    except ValueError as error:
        raise UserError(f"{out} is being made already: {error}") from None
    with task_lease:
        overlapping = []
        for path in sorted(folder.iterdir()):
            found = _NAME.fullmatch(path.name)
            other = TaskShare(int(found[1]), int(found[2])) if found else share
            if other != share and share.overlaps(other):
                overlapping.append(path)
        try:
            lease.wait_until_all_gone(overlapping, attempt, REMEDY)
        except ValueError as error:
            raise UserError(f"{out} is being made already, in other shares: {error}") from None
        yield
