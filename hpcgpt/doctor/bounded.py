"""Checks beside each other, each in a process of its own and with its own time limit.

A file system that does not answer (a dead mount) keeps a process in the kernel, where not even SIGKILL ends it. So a
check is forked, writes its findings into a pipe, and is abandoned after its limit: it is killed, and never waited for.
What it started is in its process group, and is killed with it.

No torch in here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from hpcgpt.doctor import findings
from hpcgpt.doctor.findings import Finding


@dataclass(frozen=True)
class Check:
    """A check: `run` returns its findings, or raises; it is cut off after `limit_s` seconds.

    `hangs_on` names what a check without an answer has waited for. `needed`: a run cannot do without that answer, so
    none is bad; else it is a warning.
    """

    name: str
    run: Callable[[], Sequence[Finding]]
    limit_s: float
    hangs_on: str
    needed: bool = True


@dataclass
class _Running:
    check: Check
    pid: int
    pipe: int
    deadline: float
    output: bytes = b""
    ended: bool = False
    cut_off: bool = False


def run(checks: Sequence[Check]) -> list[Finding]:
    """Run all checks at the same time; return their findings in the order of `checks`. Never raises for a check."""
    sys.stdout.flush()
    sys.stderr.flush()
    running = [_start(check) for check in checks]
    while waiting := [one for one in running if not one.ended]:
        left_s = min(one.deadline for one in waiting) - time.monotonic()
        ready = select.select([one.pipe for one in waiting], [], [], max(0.0, left_s))[0]
        for one in waiting:
            if one.pipe in ready:
                part = os.read(one.pipe, 1 << 16)
                one.output += part
                one.ended = not part
            elif time.monotonic() >= one.deadline:
                one.ended = one.cut_off = True
    return [finding for one in running for finding in _finish(one)]


def _start(check: Check) -> _Running:
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _child(check, writer)
    os.close(writer)
    return _Running(check, pid, reader, time.monotonic() + check.limit_s)


def _child(check: Check, writer: int) -> NoReturn:
    """Run the check and leave without the parent's cleanup (buffers, handlers at exit)."""
    status = 1
    try:
        os.setsid()
        try:
            found = list(check.run())
        except Exception as error:
            found = [findings.from_error(check.name, error)]
        message = json.dumps([finding.as_dict() for finding in found]).encode()
        while message:
            message = message[os.write(writer, message) :]
        status = 0
    finally:
        os._exit(status)


def _finish(one: _Running) -> list[Finding]:
    os.close(one.pipe)
    for kill in (os.killpg, os.kill):  # it may not have its own group yet
        with suppress(ProcessLookupError):
            kill(one.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(one.pid, os.WNOHANG)
    try:
        return [findings.from_dict(fields) for fields in json.loads(one.output)]
    except ValueError:
        pass
    check = one.check
    if not one.cut_off:
        return [findings.bad(check.name, "the check died", "an answer", "report this as a bug, with what it printed")]
    level = findings.bad if check.needed else findings.warning
    return [
        level(
            check.name,
            f"no answer within {check.limit_s:.0f} s",
            f"an answer from {check.hangs_on}",
            f"{check.hangs_on} may hang (a dead mount, a server that is away): try it by hand, ask the site",
        )
    ]
