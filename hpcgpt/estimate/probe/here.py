"""Runs a probe on this machine, without Slurm: a process for each rank, with the variables that torchrun sets.

No torch in here.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from hpcgpt.distributed import world
from hpcgpt.errors import UserError
from hpcgpt.estimate.probe.measure import Prepared
from hpcgpt.slurm import partitions

_ROOT = Path(__file__).resolve().parents[3]
_OTHERS_S = 20.0  # in which the other ranks end after one has failed
_POLL_S = 0.1


def refuse_on_login_node(environment: Mapping[str, str]) -> None:
    """Raise UserError where a job should measure, instead of a machine that many people share."""
    if not environment.get("SLURM_JOB_ID") and partitions.ask()[0]:
        raise UserError(
            "this machine has a Slurm, so a probe here would measure a login node: hpcgpt submit --dry-run --probe "
            "measures in a job; or start this command in an allocation of one node, made with salloc"
        )


def run(probe: Prepared, ranks: int) -> None:
    """Train the probe on `ranks` ranks of this machine.

    Raises:
        UserError: a rank has failed; with the end of what it printed.
    """
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    inherited, job = os.environ | {"PYTHONPATH": path}, secrets.token_hex(4)
    command = [sys.executable, "-P", "-m", "hpcgpt.train", str(probe.file)]
    started: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files:
        try:
            for rank in range(ranks):
                log = files.enter_context(open(_log(probe, rank), "wb"))
                environment = world.of_torchrun(inherited, rank, ranks, job)
                started.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                    )
                )
            failed = _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
    if failed is not None:
        words = _log(probe, failed).read_text(errors="replace").strip().splitlines()[-8:]
        raise UserError(
            "\n".join([f"the probe failed: rank {failed} ended with status {started[failed].returncode}", *words])
        )


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all have ended; return the first that failed, if any. Then the others have _OTHERS_S to end, too."""
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        bad = [number for number, process in enumerate(ranks) if process.returncode]
        if bad and failed is None:
            failed, deadline = bad[0], time.monotonic() + _OTHERS_S
        time.sleep(_POLL_S)
    return failed if failed is not None else next((n for n, process in enumerate(ranks) if process.returncode), None)


def _log(probe: Prepared, rank: int) -> Path:
    return probe.folder / "logs" / f"probe_{rank}.log"
