"""The drill's testbed without Slurm: ranks on this machine, and the drill does what the batch script does.

torchrun starts two ranks; a single one is started directly. When they have ended, the requeue policy decides whether
they are started again, as it does after srun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

from hpcgpt import exit_codes
from hpcgpt.config import sources
from hpcgpt.drill.faults import FaultContext, FaultKind, MissedError
from hpcgpt.drill.testbed import TRACKING_TIMES, Disk, Rank, State, ranks_among
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder
from hpcgpt.slurm import requeue_policy, restart_history, scontrol
from hpcgpt.slurm.restart_history import RestartHistory


class LocalTestbed:
    """Use it as a context: on exit its processes are ended, and its file system is unmounted."""

    kind: Literal["lab", "here"] = "here"
    name = "this machine"
    wandb: WandbServer  # from __enter__ on

    def __init__(self, home: Path, ranks: int) -> None:
        self.home, self.count = home, ranks
        self.shape = f"this machine without a Slurm, {counted(ranks, 'rank')}"
        self.disk = Disk(home / "disk", own=False)
        self._jobs: dict[str, LocalJob] = {}

    def __enter__(self) -> LocalTestbed:
        self.disk.folder.mkdir(parents=True)
        with suppress(OSError):
            options = ["-n", "-t", "tmpfs", "-o", "size=600m,mode=0755", "hpcgpt-drill", str(self.disk.folder)]
            mounted = os.geteuid() == 0 and subprocess.run(["mount", *options], check=False).returncode == 0
            self.disk = Disk(self.disk.folder, own=mounted)
        self.wandb = WandbServer()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.cancel_all()
        self.wandb.close()
        if self.disk.own:
            subprocess.run(["umount", "-n", "--lazy", str(self.disk.folder)], check=True)

    def version(self) -> str:
        return ""

    def start(self, run: str, training: Sequence[str], partition: str = "", *, again: bool = True) -> str:
        """With `again`, restart the ranks as the policy decides. (torchrun hides a refused start's status.)"""
        del partition
        name = f"{run}.{len(self._jobs) + 1}"
        log, env = self.home / f"{name}.log", self.wandb.environ()
        self._jobs[name] = LocalJob([*training, "--run.name", run], self.count, log, name, again, env)
        return name

    def state(self, job: str) -> State:
        return self._jobs[job].state()

    def failure_details(self, job: str) -> str:
        lines = (self.home / f"{job}.log").read_text(errors="replace").splitlines()
        return "\n".join([f"{job} is {self.state(job)}: {self._jobs[job].reason}", *lines[-8:]])

    def over(self, job: str) -> bool:
        return self.state(job) in ("finished", "over")

    def ranks(self, job: str) -> list[Rank]:
        self.state(job)
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return ranks_among(pids, {"HPCGPT_DRILL_JOB": self._jobs[job].mark}, "this machine")

    def healthy(self) -> bool:
        return True

    def cancel_all(self) -> None:
        for name, job in self._jobs.items():
            job.end()
            for rank in self.ranks(name):  # whose torchrun was killed
                rank.send(signal.SIGKILL)


class LocalJob:
    """A job as the batch script would run it: start the ranks, decide, start them again."""

    def __init__(
        self, training: Sequence[str], ranks: int, log: Path, mark: str, again: bool, env: dict[str, str]
    ) -> None:
        self._training, self._ranks, self._again, self._env = list(training), ranks, again, env
        self.mark, self.reason = f"{os.getpid()}.{mark}", "it runs"
        self.status: int | None = None
        self._newest = self._crashes = 0  # without a job id the events do not tell the starts apart
        self._file: IO[bytes] = open(log, "ab")  # noqa: SIM115 (as long as this object)
        self._start()

    def _start(self) -> None:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self._ranks), "--standalone"]
        command = [sys.executable, *(launcher if self._ranks > 1 else []), "-m", "hpcgpt.train", *self._training]
        drop = ("SLURM_", "MASTER_", "WANDB_", "TORCHELASTIC_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        self._started_at = time.time()
        self._running = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._file,
            env={**kept, **TRACKING_TIMES, **self._env, "HPCGPT_DRILL_JOB": self.mark},
            start_new_session=True,  # so that Ctrl-C reaches only the drill, which then ends them
        )

    def state(self) -> State:
        if self.status is None and (left := self._running.poll()) is not None:
            self._decide(left)
        if self.status is None:
            return "running"
        return "finished" if self.status == exit_codes.FINISHED else "over"

    def _decide(self, left: int) -> None:
        if not self._again:
            self.status, self.reason = left, f"exited with status {left}"
            return
        settings = sources.from_command_line(self._training, "drill", "")
        folder = settings.run_folder
        ended = run_folder.read_exit(folder)
        # Without a job id, the exit.json of an earlier attempt is recognized by its age.
        if ended and (folder / "exit.json").stat().st_mtime < self._started_at:
            ended = None
        newest = restart_history.newest_step(folder / "checkpoints") or 0
        if newest > self._newest:
            self._newest, self._crashes = newest, 0
        past = RestartHistory(crashes=self._crashes)
        decision = requeue_policy.decide(ended, left, scontrol.Job("RUNNING"), 0, past, settings.requeue)
        self._crashes += decision.crashed
        self._file.write(f"drill: status {left}: {decision.reason}\n".encode())
        self._file.flush()
        self.reason = decision.reason
        if decision.crashed:
            with suppress(OSError):
                run_folder.record(folder, "crash", status=left, reason=decision.reason)
        if decision.requeue:
            self._start()
        else:
            self.status = exit_codes.FINISHED if decision.finished else left or exit_codes.FAILED

    def end(self) -> None:
        if self.status is None:
            self.status, self.reason = exit_codes.FAILED, "ended by the drill"
            with suppress(ProcessLookupError):
                os.killpg(self._running.pid, signal.SIGKILL)
            self._running.wait()
        self._file.close()


# --- faults for this testbed only ------------------------------------------------------------------


def warn(context: FaultContext) -> str:
    return _signal_all(context, signal.SIGUSR1)


def terminate(context: FaultContext) -> str:
    return _signal_all(context, signal.SIGTERM)


def _signal_all(context: FaultContext, number: signal.Signals) -> str:
    """Send a signal to every rank, as Slurm does."""
    sent = sum(rank.send(number) for rank in context.ranks())
    if not sent:
        raise MissedError("no rank was there")
    return counted(sent, "rank")


def second_start(context: FaultContext) -> str:
    """Start the command a second time. It must be refused, and must not disturb the first one."""
    testbed = context.testbed
    assert isinstance(testbed, LocalTestbed)
    before = context.run.newest_start()
    other = testbed.start(context.run.folder.name, context.training, again=False)
    context.done = lambda: testbed.over(other)

    def refused() -> str:
        if context.run.newest_start() > before:
            return f"the second start acquired the run folder, as attempt {context.run.newest_start()}"
        return "" if testbed.state(other) == "over" else "the second start was not refused"

    context.checks.append(refused)
    return other


KINDS: tuple[FaultKind, ...] = (
    FaultKind("USR1", "SIGUSR1 to every rank", "restart", warn),
    FaultKind("TERM", "SIGTERM to every rank", "restart", terminate),
    FaultKind("second start", "the same command is started in the same run folder", "on", second_start, takes_s=20),
)
