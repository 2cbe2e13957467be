"""The drill's testbed with a real Slurm: the lab (slurm/lab), which is started unless it runs already.

The runs are on a small file system in memory that the drill can fill. The lab's nodes have their own mount namespaces,
so it is mounted before they start, or each slurmd is restarted.
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


class LabTestbed:
    """Use it as a context: on exit jobs, mount and, if the drill started it, the lab are removed."""

    kind: Literal["lab", "here"] = "lab"
    wandb: WandbServer  # from __enter__ on

    def __init__(self, name: str, subnet: str, home: Path) -> None:
        self.name, self.home = name, home
        self._commands, self._hosts = _lab_module("lab"), _lab_module("lab_hosts")
        self.shape = "a lab: a real Slurm, 2 nodes (of 4) x 2 ranks"
        self.lab = _lab_module("lab_conf").Lab(name, subnet)
        self.disk = Disk(home / "disk", own=False)
        self._started_lab = self._mounted = False
        self._jobs: list[str] = []
        self.env: dict[str, str] = {}

    def __enter__(self) -> LabTestbed:
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _prepare(self) -> None:
        self.disk.folder.mkdir(parents=True)
        is_up = self._commands.status(self.name).up
        # Restarting a slurmd gives it a new mount namespace, and must not happen while jobs are queued or running.
        if not is_up or not self._queue_of(self.lab):
            self._mount()
        if is_up:
            self.lab = _lab_module("lab_conf").load_lab(self.name)
            if self._mounted:
                self._restart_slurmds()
        else:
            self._commands.up(self.lab)
            self._started_lab = True
        self.wandb = WandbServer(f"{self.lab.subnet}.253")  # this machine, as the nodes see it
        # In a folder of its own, which a fault can hide from a node.
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
        if self._started_lab:
            self._commands.down(self.name)
        if self._mounted:
            # Unmounted at once here; for a process with an open file, when it closes that.
            self._hosts.run(["umount", "-n", "--lazy", self.disk.folder])
            if not self._started_lab:
                self._restart_slurmds()  # their mount namespaces would keep it mounted

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
        flags = [f"--job-name={run}", "--time=60", "--signal=USR1@30", f"--partition={partition}"]
        return self.submit(*shape, *flags, str(SCRIPT), *training, "--run.name", run)

    def submit(self, *arguments: str) -> str:
        output = self.home / "slurm-%j.out"
        job = self.slurm("sbatch", "--parsable", f"--output={output}", *arguments).strip()
        self._jobs.append(job)
        return job

    def slurm(self, *command: str) -> str:
        """Return the output of a Slurm command. Raises OSError with its message if it fails."""
        done = subprocess.run(
            command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; {} if there is no such job."""
        with suppress(OSError):
            return fields_of(self.slurm("scontrol", "show", "job", job))
        return {}

    def state(self, job: str) -> State:
        found = self._state(job)
        if found == "over":
            # While Slurm requeues a job, or is overloaded, it may show a state that lasts only a moment.
            time.sleep(SECOND_LOOK_S)
            found = self._state(job)
        return found

    def _state(self, job: str) -> State:
        found = self.show(job).get("JobState", "unknown")
        if found == "COMPLETED":
            return "finished"
        if found in ("PENDING", "CONFIGURING", "REQUEUED"):
            return "waiting"
        return "running" if found in ("RUNNING", "COMPLETING", "SUSPENDED") else "over"

    def failure_details(self, job: str) -> str:
        found = self.show(job)
        path = self.home / f"slurm-{job}.out"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"job {job} is {found.get('JobState')}, reason {found.get('Reason')}", *lines[-6:]])

    def over(self, job: str) -> bool:
        return self.state(job) in ("finished", "over")

    def cancel_all(self) -> None:
        alive = [job for job in self._jobs if not self.over(job)]
        for job in alive:
            self.slurm("scancel", job)
        deadline = time.monotonic() + 60
        while set(alive) & set(self._queue_of(self.lab)) and time.monotonic() < deadline:
            time.sleep(0.5)
        for job in self._jobs:
            for rank in self.ranks(job):  # an orphan, which no slurmd ends
                rank.send(signal.SIGKILL)

    # --- processes and hosts -----------------------------------------------------------------------

    def ranks(self, job: str) -> list[Rank]:
        found = []
        for node in self.lab.node_names:
            found += ranks_among(self._hosts.processes(self.lab, node), {"SLURM_JOB_ID": job}, node)
        return sorted(found, key=lambda rank: rank.rank)

    def launcher(self, job: str) -> int | None:
        """Return the pid of the srun that the batch script runs."""
        for pid in self._hosts.processes(self.lab, called="srun"):
            with suppress(OSError):
                if "hpcgpt.train" in command_line(pid) and environment(pid).get("SLURM_JOB_ID") == job:
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
        except OSError:  # its slurmd may have registered by itself, and Slurm has resumed the node then
            if self._commands.node_states(self.lab).get(node, "down").startswith("down"):
                raise

    def version(self) -> str:
        return self.slurm("sinfo", "--version").strip().removeprefix("slurm-wlm ").removeprefix("slurm ")


def why_no_lab() -> str:
    """Return why no lab can be started here; '' if one can."""
    if not SCRIPT.is_file():
        return (
            f"there is no {SCRIPT}: a lab needs a checkout. Clone hpcgpt's repository, and in it run `make install` "
            "and `sudo .venv/bin/python -m hpcgpt.drill`"
        )
    return str(_lab_module("lab_needs").why_not())


def _lab_module(name: str) -> Any:
    """Import a module of slurm/lab, which is a tool of the checkout and not part of the package."""
    folder = str(CHECKOUT / "slurm" / "lab")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
