"""Run this project's commands as real processes: one, several ranks, or under torchrun."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tests.preloaded import Preloaded, Program

ROOT = Path(__file__).resolve().parent.parent
NEED_TORCH = ("hpcgpt.train", "hpcgpt.sample", "hpcgpt.eval", "hpcgpt.export", "hpcgpt.import_weights", "hpcgpt.drill",
              "tests.checkpoint.ranks_many", "tests.output.broken_part")  # fmt: skip

_preloaded: list[Preloaded] = []


def program(
    module: str, arguments: Sequence[str], env: dict[str, str], cwd: Path, out: IO[Any], err: IO[Any]
) -> Program:
    """Start ``python -m module arguments`` where torch is loaded already."""
    if not _preloaded:
        _preloaded.append(Preloaded(shared=True))
    return _preloaded[0].start(module, arguments, env, cwd, out, err)


def command(module: str, *arguments: str, env: dict[str, str] | None = None, timeout_s: float = 120,
            cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``python -m module arguments`` to its end, as a user would."""
    command_line, env = [sys.executable, "-m", module, *arguments], clean_env() | (env or {})
    if module not in NEED_TORCH:
        done = subprocess.run(command_line, capture_output=True, cwd=cwd, env=env, timeout=timeout_s, check=False)
        return subprocess.CompletedProcess(command_line, done.returncode, done.stdout.decode(), done.stderr.decode())
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = program(module, arguments, env, cwd, out, err)
        status = running.wait(timeout_s)
        if status is None:
            running.kill()
            raise subprocess.TimeoutExpired(command_line, timeout_s, _output(out), _output(err))
        return subprocess.CompletedProcess(command_line, status, _output(out), _output(err))


class Running:
    """``python -m module arguments`` that runs beside the test, forked from a process that has loaded torch.

    It has what tests need of Popen. `env` is its whole environment. Its output is read at its end.
    """

    def __init__(self, module: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed at its end)
        self._program = program(module, arguments, clean_env() if env is None else env, ROOT, *self._files)
        self.pid = self._program.pid
        self.output = self.errors = ""

    def poll(self) -> int | None:
        return self._program.wait(0)

    def send_signal(self, number: int) -> None:
        self._program.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        """Return its status, with `output` and `errors` read."""
        status = self._program.wait(timeout_s)
        assert status is not None, f"it still runs after {timeout_s:g} s: {_output(self._files[1])}"
        self._close()
        return status

    def kill(self) -> None:
        """Kill it, also one that is stopped, unless it has ended."""
        self._program.kill()
        self._close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _close(self) -> None:
        if not self._files[0].closed:
            self.output, self.errors = map(_output, self._files)
            for file in self._files:
                file.close()


def _output(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")  # what was killed may have written a part of a character


def on_ranks(count: int, module: str, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments`` as that many ranks on this host, with the variables that torchrun sets.

    When one rank fails the others are ended, as by torchrun; after a timeout none is left. The status is the first one
    that is not 0.
    """
    run_id = secrets.token_hex(4)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = [
            program(module, arguments, rank_env(run_id, number, count), ROOT, out, err) for number in range(count)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            while any(rank.wait(0.01) is None for rank in running):
                assert time.monotonic() < deadline, f"{module} still runs after {timeout_s} s: {_output(err)}"
                if any(rank.returncode for rank in running):
                    deadline = min(deadline, time.monotonic() + 30)  # they may end by themselves, and report the reason
        finally:
            for rank in running:
                rank.kill()
        status = next((rank.returncode for rank in running if rank.returncode), 0)
        return subprocess.CompletedProcess([module, *arguments], status, _output(out), _output(err))


def rank_env(run_id: str, number: int, count: int) -> dict[str, str]:
    """Return the environment of rank `number` of `count` on this host, with the variables that torchrun sets."""
    return clean_env() | {"TORCHELASTIC_RUN_ID": run_id, "RANK": str(number), "LOCAL_RANK": str(number),
                          "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip


def torchrun(ranks: int, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun -m arguments`` with that many processes on this host; on a timeout none of them is left."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m"]
    return run_group([*launcher, *arguments], clean_env(), ROOT, timeout_s)


def run_group(
    command_line: Sequence[str], env: dict[str, str], cwd: Path, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. On a timeout all processes that it has started are killed, too."""
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env,
                          start_new_session=True) as running:  # fmt: skip
        try:
            out, err = running.communicate(timeout=timeout_s)
        except BaseException:  # also pytest's own time limit: the block would wait for the command's end
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command_line, running.returncode, out, err)


def clean_env() -> dict[str, str]:
    """Return this environment without variables of a launcher, Slurm, wandb, or the make that started the tests."""
    drop = ("MAKE", "MFLAGS", "ARGS", "SLURM_", "MASTER_", "WANDB_", "TORCHELASTIC_", "GLOO_", "OMP_", "OMPI_", "PMI",
            "RANK", "WORLD_SIZE")  # fmt: skip
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"WANDB_MODE": "offline"}
