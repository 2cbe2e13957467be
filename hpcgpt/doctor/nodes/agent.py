"""The agent of a node: starts and kills its workers, and checks what needs no torch.

``python -m hpcgpt.doctor.nodes.agent ADDRESSES PORT``, started by srun on each node. It connects to the coordinator and
does what it is asked, until the connection is closed; then it kills what it has started. The token is in
HPCGPT_DOCTOR_TOKEN.

No torch in here: the agent answers also where torch cannot be loaded.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from hpcgpt.distributed import world
from hpcgpt.doctor import bounded, disk_limits, disks, machine, network
from hpcgpt.doctor.bounded import Check
from hpcgpt.doctor.findings import Finding, ok
from hpcgpt.doctor.nodes import gpu_state, wire
from hpcgpt.doctor.nodes.wire import Message

CONNECT_S = 20.0
CHECK_S = 8.0
READ_BYTES, READ_S = 256 << 20, 3.0
LEAST_READ_BYTES = 32 << 20  # of fewer the rate says nothing
TOO_LITTLE = "too little to measure"
MOUNT = " mount"  # the end of the names of checks that the coordinator compares


def main(argv: Sequence[str]) -> int:
    addresses, port = argv[0].split(","), int(argv[1])
    connection = wire.connect(addresses, port, CONNECT_S)
    agent = Agent(addresses, port)
    greeting = {"token": os.environ["HPCGPT_DOCTOR_TOKEN"], "kind": "agent", "node": agent.node, "pid": os.getpid(),
                "python": platform.python_version(), "kernel": platform.release(), "driver": gpu_state.driver(),
                "gpus": world.allocated_gpus(os.environ), "cpu_limit": world.cgroup_cpu_limit()}  # fmt: skip
    try:
        wire.serve(connection, greeting, {"start": agent.start, "kill": agent.kill, "check": agent.check,
                                          "read": agent.read, "clock": agent.clock})  # fmt: skip
    except OSError:
        pass  # the coordinator is gone
    finally:
        agent.end()
    return 0


class Agent:
    """Owns the processes of one node."""

    def __init__(self, addresses: Sequence[str], port: int) -> None:
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._where = [",".join(addresses), str(port)]
        self._forker: subprocess.Popen[str] | None = None

    def start(self, request: Message) -> Message:
        """Start a worker for each of `devices`, and the process that forks them if there is none. Does not wait."""
        if self._forker is None:
            self._forker = subprocess.Popen(
                [sys.executable, "-m", "hpcgpt.doctor.nodes.worker", *self._where],
                stdin=subprocess.PIPE, text=True, start_new_session=True,
                env=os.environ | {"HPCGPT_DOCTOR_NODE": self.node},
            )  # fmt: skip
        assert self._forker.stdin is not None
        self._forker.stdin.write("".join(f"{int(device)}\n" for device in request["devices"]))
        self._forker.stdin.flush()
        return {}

    def kill(self, request: Message) -> Message:
        with suppress(ProcessLookupError):
            pid = int(request["pid"])
            if self._forker is not None and os.getpgid(pid) == self._forker.pid:  # a pid may have been reused
                os.kill(pid, signal.SIGKILL)
        return {}

    def end(self) -> None:
        if self._forker is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._forker.pid, signal.SIGKILL)

    def clock(self, _: Message) -> Message:
        return {"time": time.time()}

    def check(self, request: Message) -> Message:
        """Check this node's limits, mounts and disks; `folders` are pairs of name and path.

        `run_bytes`: of all checkpoints that the run folder has at one time.
        """
        checks = [
            Check("limits", machine.limits, CHECK_S, "the kernel"),
            Check("TMPDIR", machine.scratch, CHECK_S, "the folder for temporary files"),
            Check("GPU state", gpu_state.check, CHECK_S, "nvidia-smi or rocm-smi"),
            Check(
                "wandb",
                partial(network.wandb, str(request["wandb"]), str(request.get("wandb_server", ""))),
                CHECK_S,
                "the W&B server or the proxy",
                needed=network.needed(str(request["wandb"])),
            ),
        ]
        for name, path in request["folders"]:
            disk, folder = f"the file system of {path}", Path(path)
            checks.append(Check(f"{name}{MOUNT}", partial(mount, name, folder), CHECK_S, disk))
            if name == "run folder":
                room = partial(disks.room_of_run, name, folder, int(request["run_bytes"]))
                checks += [Check(name, room, CHECK_S, disk),
                           Check(name, partial(disks.operations, name, folder), CHECK_S, disk)]  # fmt: skip
        return {"findings": [finding.as_dict() for finding in bounded.run(checks)]}

    def read(self, request: Message) -> Message:
        """Read shards of the data sets in `folders`. The finding begins with the rate in GB/s, or with TOO_LITTLE."""
        folders = [Path(path) for path in request["folders"]]
        check = Check("reading shards", partial(read_shards, folders), READ_S + 2, f"the file system of {folders[0]}")
        return {"findings": [finding.as_dict() for finding in bounded.run([check])]}


def mount(name: str, folder: Path) -> list[Finding]:
    """Report on which file system the folder is; the coordinator compares the nodes."""
    there = disks.existing(folder)
    found = disk_limits.mount_of(there)
    return [ok(f"{name}{MOUNT}", f"{there} is on {found.kind} at {found.point}")]


def read_shards(folders: Sequence[Path]) -> list[Finding]:
    """Read the first shards of each data set, READ_BYTES and READ_S at most. Raises UserError or OSError."""
    from hpcgpt.data import shard_format

    done, elapsed_s = 0, 1e-9
    for folder in folders:
        for shard in shard_format.read_manifest(folder).shards:
            if done < READ_BYTES and elapsed_s < READ_S:
                path = folder / f"{shard.name}.bin"
                count, took_s = disks.read_rate(path, READ_BYTES - done, READ_S - elapsed_s)
                done, elapsed_s = done + count, elapsed_s + took_s
    if done < LEAST_READ_BYTES:
        return [ok("reading shards", f"{TOO_LITTLE}, {disks.size(done)}")]
    return [ok("reading shards", f"{done / elapsed_s / 1e9:.6g} GB/s, {disks.size(done)} read")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
