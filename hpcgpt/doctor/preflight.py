"""The quick check of a job's nodes before each start (`doctor.preflight`), in a few seconds and without torch.

`failing` runs on the first node, in ``hpcgpt.requeue folder``. It starts one process on each node with srun; each
checks its mounts, shared memory, limits, clock and the state of its GPUs, and prints what is bad as one line of JSON.
A node that prints nothing fails, too. Nodes that fail are excluded from the job's next start.

    srun ... python -m hpcgpt.doctor.preflight RUN_FOLDER DATA_FOLDER...
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.doctor import bounded, disks, machine, whole_nodes
from hpcgpt.doctor.bounded import Check
from hpcgpt.doctor.findings import Finding, bad, ok
from hpcgpt.doctor.nodes import gpu_state
from hpcgpt.output import streams

LIMIT_S = 60.0  # of all nodes together; srun on thousands of nodes takes some tens of seconds
END_S = 10.0  # for srun to cancel a step that did not end in time
CHECK_S = 8.0
SCRATCH_BYTES = 64 << 20  # diskless nodes have little, which is no reason to refuse a start; a full disk is
PREFIX = "hpcgpt-preflight "


def failing(config: Config, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Check the nodes of this job; return node -> reason for those that fail. {} if that could not be found out."""
    nodes = world.expand_hosts(env.get("SLURM_JOB_NODELIST", ""))
    if not nodes or shutil.which("srun") is None:
        streams.warn("doctor.preflight: there is no srun here (a container?), so the nodes are not checked")
        return {}
    data = config.from_anywhere.data
    folders = [config.from_anywhere.run_folder, *(Path(part.dir) for part in data.mix)]
    folders += [] if data.mix else [Path(data.dir)]
    python = env.get("HPCGPT_PYTHON") or sys.executable
    # srun refuses masks of cores that a site exports for the ranks (SLURM_CPU_BIND, as on LUMI).
    command = ["srun", *whole_nodes.flags(len(nodes), env), "--cpus-per-task=1", "--cpu-bind=none", python, "-m",
               "hpcgpt.doctor.preflight", *map(str, folders)]  # fmt: skip
    try:
        output, errors = _run(command, LIMIT_S, whole_nodes.environment(env))
    except OSError as error:
        streams.warn(f"doctor.preflight: {error}")
        return {}
    return read(output, errors, nodes)


def _run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """Run srun; return its output and errors, also those of a step that did not end in time.

    SIGTERM lets srun cancel its step. After SIGKILL the step would stay on the nodes, beside the ranks.
    """
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, errors="replace", start_new_session=True, env=env) as srun:  # fmt: skip
        with suppress(subprocess.TimeoutExpired):
            return srun.communicate(timeout=limit_s)
        srun.terminate()
        with suppress(subprocess.TimeoutExpired):
            return srun.communicate(timeout=END_S)
        os.killpg(srun.pid, signal.SIGKILL)  # also what keeps its output open
        return srun.communicate()


def read(output: str, errors: str, nodes: Sequence[str]) -> dict[str, str]:
    """Read what the nodes have printed. If none has printed anything, srun has failed, and no node is at fault."""
    reasons: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith(PREFIX):
            with suppress(ValueError, KeyError, TypeError):  # a line that was cut off says nothing
                answer = json.loads(line.removeprefix(PREFIX))
                reasons[str(answer["node"])] = str(answer["reason"])
    if not reasons:
        streams.warn(f"doctor.preflight: no node has answered, so none is excluded: {errors.strip()[-500:]}")
        return {}
    silent = {node: "it has answered nothing" for node in nodes if node not in reasons}
    return silent | {node: reason for node, reason in reasons.items() if reason}


def is_common(failing: Mapping[str, str], nodes: int) -> bool:
    """Return whether all `nodes` of a job fail, for reasons that others would have, too: not those of their GPUs."""
    parts = [part for reason in failing.values() for part in reason.split("; ")]
    return len(failing) == nodes and not any(part.startswith(f"{check}:") for part in parts
                                             for check in gpu_state.OWN_FAULTS)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    run, *data = map(Path, argv)
    found = bounded.run(checks(run, data))
    # A full disk is no node's fault, and a run on one trains.
    failed = [finding for finding in found if finding.level == "bad" and finding.check != "run folder room"]
    reason = "; ".join(f"{finding.check}: {finding.found}" for finding in failed)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    print(PREFIX + json.dumps({"node": node, "reason": reason}), flush=True)
    return 0


def checks(run: Path, data: Sequence[Path]) -> list[Check]:
    allocated = world.allocated_gpus(os.environ)
    found = [
        Check("limits", machine.limits, CHECK_S, "the kernel"),
        Check("TMPDIR", partial(machine.scratch, SCRATCH_BYTES), CHECK_S, "the folder for temporary files"),
        Check("GPU state", partial(gpu_state.check, allocated), CHECK_S, "nvidia-smi or the GPU's driver"),
        Check("run folder", partial(disks.operations, "run folder", run), CHECK_S, f"the file system of {run}"),
    ]
    return found + [Check("data", partial(_there, path), CHECK_S, f"the file system of {path}") for path in data]


def _there(folder: Path) -> list[Finding]:
    path = folder / "manifest.json"
    if not path.is_file():
        return [bad("data", f"there is no {path}", "the shards, as on the other nodes", "")]
    return [ok("data", f"{path} is there")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
