"""The drill's place with a real Slurm: the lab (slurm/lab), brought up for the drill unless it is up.

The runs are on a file system of the drill's own, small and in memory, that can be filled. A lab's nodes have
their own mount namespaces, so it is mounted before they come up, or their slurmd are started again.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from hpcgpt.drill.testbed import TRACKING_TIMES, Disk, Rank, State, command_line, environment, ranks_among
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.slurm.scontrol import fields_of

CHECKOUT = Path(__file__).resolve().parent.parent.parent
SCRIPT = CHECKOUT / "slurm" / "pretrain.sbatch"
SHAPE = ("--nodes=2", "--ntasks-per-node=2")
DISK_MB = 600

SECOND_LOOK_S = 3.0


class LabPlace:
    """Use it as a context: on leaving, jobs, mount and (if the drill brought it up) the lab are taken away."""

    kind: Literal["lab", "here"] = "lab"
    wandb: WandbServer  # from __enter__ on

    def __init__(self, name: str, subnet: str, home: Path) -> None:
        self.name, self.home = name, home
        self._commands, self._hosts = _lab_module("lab"), _lab_module("lab_hosts")
        self.shape = "a lab: a real Slurm, 2 nodes (of 4) x 2 ranks"
        self.lab = _lab_module("lab_conf").Lab(name, subnet)
        self.disk = Disk(home / "disk", own=False)
        self._brought_up = self._mounted = False
        self._jobs: list[str] = []
        self.env: dict[str, str] = {}

    def __enter__(self) -> LabPlace:
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _prepare(self) -> None:
        self.disk.folder.mkdir(parents=True)
        is_up = self._commands.status(self.name).up
        # A slurmd that is started again has a new mount namespace, which takes nobody's jobs along if there are none.
        if not is_up or not self._queue_of(self.lab):
            self._mount()
        if is_up:
            self.lab = _lab_module("lab_conf").recall(self.name)
            if self._mounted:
                self._restart_slurmds()
        else:
            self._commands.up(self.lab)
            self._brought_up = True
        self.wandb = WandbServer(f"{self.lab.subnet}.253")  # this machine, as the nodes see it
        # In a folder of its own, which a node may lack.
        self.environment = self.home / "environment"
        self.environment.mkdir()
        python = self.environment / "python"
        python.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        self.env = {
            **self.lab.environ(),
            "HPCGPT_PYTHON": str(python),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **TRACKING_TIMES,
            **self.wandb.environ(),
        }

    def __exit__(self, *_exception: object) -> None:
        if hasattr(self, "wandb"):
            self.wandb.close()
        if self._brought_up:
            self._commands.down(self.name)
        if self._mounted:
            # At once for us, for whoever still has a file open there when that is closed.
            self._hosts.run(["umount", "-n", "--lazy", self.disk.folder])
            if not self._brought_up:
                self._restart_slurmds()  # their namespaces would hold it for as long as they live

    def _mount(self) -> None:
        folder = self.disk.folder
        self._hosts.run(["mount", "-n", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=0755", "hpcgpt-drill", folder])
        self._mounted = True
        self.disk = Disk(folder, own=True)

    def _restart_slurmds(self) -> None:
        for node in self.lab.node_names:
            self._hosts.kill(self.lab, node, "slurmd")
            self._hosts.start_daemon(self.lab, node, "slurmd")
        self._commands.wait_until_idle(self.lab)

    def _queue_of(self, lab: Any) -> list[str]:
        return str(self._commands.slurm(lab, "squeue", "--noheader", "--format=%A")).split()

    # --- jobs --------------------------------------------------------------------------------------

    def start(self, run: str, training: Sequence[str], partition: str = "low", shape: Sequence[str] = SHAPE) -> str:
        """Submit the batch script of this checkout, as a user would."""
        words = [f"--job-name={run}", "--time=60", "--signal=USR1@30", f"--partition={partition}"]
        return self.submit(*shape, *words, str(SCRIPT), *training, "--run.name", run)

    def submit(self, *words: str) -> str:
        output = self.home / "slurm-%j.out"
        job = self.slurm("sbatch", "--parsable", f"--output={output}", *words).strip()
        self._jobs.append(job)
        return job

    def slurm(self, *command: str) -> str:
        """A Slurm command's output; a refusal is an OSError with what it said."""
        done = subprocess.run(
            command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says of a job; {} if it knows none of that number."""
        with suppress(OSError):
            return fields_of(self.slurm("scontrol", "show", "job", job))
        return {}

    def state(self, job: str) -> State:
        found = self._state(job)
        if found == "over":
            # While it requeues a job, or is too busy to answer, Slurm may say what is true for a moment only.
            time.sleep(SECOND_LOOK_S)
            found = self._state(job)
        return found

    def _state(self, job: str) -> State:
        said = self.show(job).get("JobState", "unknown")
        if said == "COMPLETED":
            return "finished"
        if said in ("PENDING", "CONFIGURING", "REQUEUED"):
            return "waiting"
        return "running" if said in ("RUNNING", "COMPLETING", "SUSPENDED") else "over"

    def last_words(self, job: str) -> str:
        said = self.show(job)
        path = self.home / f"slurm-{job}.out"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"job {job} is {said.get('JobState')}, reason {said.get('Reason')}", *lines[-6:]])

    def over(self, job: str) -> bool:
        return self.state(job) in ("finished", "over")

    def cancel_all(self) -> None:
        mine = [job for job in self._jobs if not self.over(job)]
        for job in mine:
            self.slurm("scancel", job)
        deadline = time.monotonic() + 60
        while set(mine) & set(self._queue_of(self.lab)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for job in self._jobs:
            for rank in self.ranks(job):  # an orphan, which no slurmd ends any more
                rank.send(signal.SIGKILL)

    # --- processes and hosts -----------------------------------------------------------------------

    def ranks(self, job: str) -> list[Rank]:
        found = []
        for node in self.lab.node_names:
            found += ranks_among(self._hosts.processes(self.lab, node), {"SLURM_JOB_ID": job}, node)
        return sorted(found, key=lambda rank: rank.rank)

    def launcher(self, job: str) -> int | None:
        """The pid of the srun that the batch script runs."""
        for pid in self._hosts.processes(self.lab, called="srun"):
            with suppress(OSError):
                words = command_line(pid)
                if "hpcgpt.train" in words and environment(pid).get("SLURM_JOB_ID") == job:
                    return int(pid)
        return None

    def healthy(self) -> bool:
        states = self._commands.node_states(self.lab)
        return len(states) == len(self.lab.node_names) and set(states.values()) <= set(self._commands.RESPONDING)

    def cut(self, node: str) -> None:
        self._commands.cut(self.lab, node)

    def heal(self, node: str) -> None:
        self._commands.heal(self.lab, node)

    def hide(self, node: str, path: Path) -> None:
        self._commands.hide(self.lab, node, path)

    def unhide(self, node: str, path: Path) -> None:
        self._commands.unhide(self.lab, node, path)

    def kill_slurmd(self, node: str) -> None:
        self._commands.kill_slurmd(self.lab, node)

    def start_slurmd(self, node: str) -> None:
        self._commands.start_slurmd(self.lab, node)

    def set_down(self, node: str) -> None:
        self.slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=drill")

    def resume(self, node: str) -> None:
        try:
            self.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME")
        except OSError:  # its slurmd registers by itself now and then, and Slurm has then returned it already
            if self._commands.node_states(self.lab).get(node, "down").startswith("down"):
                raise

    def version(self) -> str:
        return self.slurm("sinfo", "--version").strip().removeprefix("slurm-wlm ").removeprefix("slurm ")


def why_no_lab() -> str:
    """The sentence that says why no lab can be had here; '' if one can."""
    if not SCRIPT.is_file():
        return (
            f"there is no {SCRIPT}: a lab is brought up from a checkout. Clone hpcgpt's repository, and in it type "
            "`make install` and `sudo .venv/bin/python -m hpcgpt.drill`"
        )
    return str(_lab_module("lab_needs").why_not())


def _lab_module(name: str) -> Any:
    """A module of slurm/lab, which is a tool of the checkout and no part of the package."""
    folder = str(CHECKOUT / "slurm" / "lab")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
