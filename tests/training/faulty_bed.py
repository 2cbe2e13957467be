"""A test bed in which one file operation of a run fails; afterwards the run is started again without a fault.

A file operation is a call of the C library, in one process, about a file of the run or of its shards (faulty_calls.c,
preloaded by the dynamic linker). A run without faults lists them. A site is a call, a path and a number: the third
``read`` of ``run/run.json`` in a first start.
"""

from __future__ import annotations

import errno
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpcgpt.config.operation import Requeue
from hpcgpt.exit_codes import AGAIN, FAILED, FINISHED
from hpcgpt.run import crash_report, run_folder
from hpcgpt.slurm import requeue_policy
from hpcgpt.slurm.requeue_policy import Decision
from hpcgpt.slurm.restart_history import RestartHistory
from hpcgpt.slurm.scontrol import Job
from tests.preloaded import Preloaded
from tests.programs import ROOT, clean_env
from tests.tiny_run import TINY, curve, tensors

Phase = Literal["start", "resume"]
Later = Literal["once", "path", "disk"]

STEPS = 6
FLAGS = ("--train.steps", str(STEPS), "--checkpoint.every", "2", "--checkpoint.keep_last", "2", "--eval.every", "3",
         "--eval.batches", "2", "--model.dropout", "0.1")  # fmt: skip
TIME_LIMIT_S = 60.0

# The errors of a disk, its server or its quota. Not ENOENT and its like: a wrong path in the command gives them too.
ANSWERS: dict[str, Sequence[int]] = {
    "access": (errno.EIO, errno.ESTALE),
    "chmod": (errno.EPERM, errno.EROFS, errno.EIO),
    "close": (errno.EDQUOT, errno.EIO, errno.ENOSPC),
    "create": (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.EIO, errno.ESTALE),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EDQUOT),
    "link": (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSPC, errno.EIO),
    "mkdir": (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO),
    "mmap": (errno.ENOMEM, errno.EIO),
    "open": (errno.ESTALE, errno.EIO, errno.EMFILE),
    "opendir": (errno.EMFILE, errno.ESTALE, errno.EIO),
    "read": (errno.EIO, errno.ESTALE),
    "readdir": (errno.EIO, errno.ESTALE),
    "rename": (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS),
    "rmdir": (errno.EIO, errno.EROFS),
    "stat": (errno.ESTALE, errno.EIO),
    "statvfs": (errno.EIO, errno.ESTALE),
    "truncate": (errno.EIO, errno.EROFS),
    "unlink": (errno.EIO, errno.EROFS, errno.ESTALE),
    "utimens": (errno.EROFS, errno.EIO),
    "write": (errno.ENOSPC, errno.EDQUOT, errno.EIO),
}


@dataclass(frozen=True)
class Site:
    call: str
    path: str  # under run/ or shards/; * in place of host and process
    nth: int

    def __str__(self) -> str:
        return f"{self.call} {self.path} #{self.nth}"


@dataclass(frozen=True)
class Case:
    phase: Phase
    site: Site
    errno: int
    later: Later = "once"

    def __str__(self) -> str:
        return f"{self.phase}: {self.site}: {errno.errorcode[self.errno]} {self.later}"


@dataclass(frozen=True)
class Ended:
    """The end of a start; `status` is None if it had to be killed."""

    status: int | None
    out: str
    err: str
    calls: Sequence[tuple[str, str, bool]]

    @property
    def fired(self) -> bool:
        return any(fired for *_, fired in self.calls)


class FaultyBed:
    """Runs the cases, each in a run folder of its own; `hits` counts those in which the call came."""

    def __init__(self, folder: Path, shards: Path, library: Path) -> None:
        self.folder, self._shards, self._count = folder, shards, 0
        self.hits = 0
        self._preloaded = Preloaded(library)
        (folder / "tiny.toml").write_text(f'{TINY}\n[data]\ndir = "{shards}"\n')
        self.uninterrupted, self.stopped = folder / "uninterrupted" / "tiny", folder / "stopped" / "tiny"
        self.calls: dict[Phase, list[Site]] = {"start": self._calls(self.train(self.uninterrupted.parent, 0))}
        # The state that a kill after the last rows would leave.
        shutil.copytree(self.uninterrupted, self.stopped)
        shutil.rmtree(self.stopped / "checkpoints" / f"step_{STEPS:09d}")
        (self.stopped / "exit.json").unlink()
        runs = folder / "resumed"
        shutil.copytree(self.stopped.parent, runs)
        self.calls["resume"] = self._calls(self.train(runs, 1))

    def close(self) -> None:
        self._preloaded.close()

    def train(self, runs: Path, restart: int, case: Case | None = None) -> Ended:
        """Run one start of job 7, as the only task of its step."""
        env = clean_env() | {
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
            "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_RESTART_COUNT": str(restart),
            "SLURM_STEP_NODELIST": socket.gethostname(), "PYTHONUNBUFFERED": "1",
            "FAULTY_ROOTS": f"{runs / 'tiny'}:{self._shards}", "FAULTY_LOG": str(runs.with_name(f"{runs.name}.calls")),
        }  # fmt: skip
        if case:
            path = re.sub(r"([\[?])", r"[\1]", case.site.path)
            path = path.replace("run/", f"{runs / 'tiny'}/", 1).replace("shards/", f"{self._shards}/", 1)
            env |= {"FAULTY_CALL": case.site.call, "FAULTY_PATH": path.rstrip("/"), "FAULTY_NTH": str(case.site.nth),
                    "FAULTY_ERRNO": str(case.errno), "FAULTY_LATER": case.later}  # fmt: skip
        log = Path(env["FAULTY_LOG"])
        log.unlink(missing_ok=True)
        arguments = [str(self.folder / "tiny.toml"), "--run.dir", str(runs), "--run.name", "tiny", *FLAGS]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            running = self._preloaded.start("hpcgpt.train", arguments, env, ROOT, out, err)
            status = running.wait(TIME_LIMIT_S)
            running.kill()
            outputs = []
            for file in (out, err):
                file.seek(0)
                outputs.append(file.read().decode())
        calls = []
        for line in log.read_text().splitlines():
            call, path, fired = line.split("\t")
            calls.append((call, self._canonical(path, runs), fired == "1"))
        return Ended(status, outputs[0], outputs[1], calls)

    def _canonical(self, path: str, runs: Path) -> str:
        for root, name in ((runs / "tiny", "run"), (self._shards, "shards")):
            if path == str(root) or path.startswith(f"{root}/"):
                path = f"{name}/{path[len(str(root)) + 1 :]}"
        path = re.sub(r"/\.[^/]*-\d+\.probe$", "/.*.probe", path)
        return re.sub(r"/\.([^/]+)\.[^/]*-\d+[^/]*\.(tmp|new)$", r"/.\1.*.\2", path)

    def _calls(self, ended: Ended) -> list[Site]:
        assert ended.status == FINISHED, ended.err
        seen: dict[tuple[str, str], int] = {}
        sites = []
        for call, path, _ in ended.calls:
            if path.endswith(".alive"):
                continue  # a heartbeat: how many there are depends on the time
            seen[call, path] = seen.get((call, path), 0) + 1
            sites.append(Site(call, path, seen[call, path]))
        return sites

    def problems(self, case: Case) -> Iterator[str]:
        """Yield everything that is wrong after a run in which that call failed.

        The call may not come, where threads run in another order. The run is checked all the same; `hits` counts the
        others.
        """
        self._count += 1
        runs = self.folder / f"case_{self._count}"
        if case.phase == "resume":
            shutil.copytree(self.stopped.parent, runs)
        folder, restart = runs / "tiny", 0 if case.phase == "start" else 1
        try:
            ended = self.train(runs, restart, case)
            self.hits += ended.fired
            if ended.status is None:
                yield f"it hangs: {ended.err[-500:]}"
                return
            if ended.status not in (FINISHED, FAILED, AGAIN):
                yield f"status {ended.status}: {ended.err[-500:]}"
            if "Traceback" in ended.err:
                yield f"a traceback: {ended.err[-1500:]}"
            decision = decided(folder, f"7_{restart}", ended.status, restart)
            if not decision.requeue and not decision.finished:
                yield f"decision: {decision.reason}"
            if case.phase == "resume" and not any((folder / "checkpoints").glob("step_*")):
                yield "no checkpoint is left"
            rerun = None
            if ended.status != FINISHED or not (folder / f"checkpoints/step_{STEPS:09d}").exists():
                rerun = self.train(runs, restart + 1)
                if rerun.status != FINISHED:
                    yield f"started again: status {rerun.status}: {rerun.err[-500:]}"
                    return
            last = f"checkpoints/step_{STEPS:09d}"
            if tensors(folder / last) != tensors(self.uninterrupted / last):
                yield "other tensors"
            if curve(folder) != curve(self.uninterrupted):
                yield f"another curve: {[row[0] for row in curve(folder)]}"
            lost = self._lost(folder)
            if lost - {"exit.json"} and rerun is None:
                # A run that finished lacks what could not be written, config.toml for one: the next start writes it.
                rerun = self.train(runs, restart + 1)
                lost = self._lost(folder)
            if lost - ({"exit.json"} if rerun is None else set()):
                yield f"lost: {lost}"
        finally:
            shutil.rmtree(runs, ignore_errors=True)

    def _lost(self, folder: Path) -> set[str]:
        """Return the files that the run without a fault has and this one lacks."""
        found = {path.name for path in self.uninterrupted.iterdir()} - {path.name for path in folder.iterdir()}
        return found - {"verified.json"}  # it only saves a later start some reading


def decided(folder: Path, attempt: str, status: int, restart: int) -> Decision:
    """Return the decision of the batch script's policy about this end."""
    ended = run_folder.read_exit(folder)
    if ended and ended.attempt != attempt:
        ended = None
    blamed = crash_report.first_failure([], crash_report.read(folder, attempt))
    return requeue_policy.decide(ended, status, Job("RUNNING", restart), restart, RestartHistory(), Requeue(), blamed)
