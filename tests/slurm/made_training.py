"""A training job without training: it writes what a real one writes, and runs the real requeue policy.

    python -m tests.slurm.made_training finish|crash|wait TRAIN_ARGUMENTS

It is the batch script of a real Slurm job. `finish` makes all steps; `crash` makes some, and ends with status 1; `wait`
makes some, and waits for SIGTERM, at which it saves; until then its rows are replaced by new ones, as in a run that
trains. hpcgpt.requeue then decides, as slurm/pretrain.sbatch has it do.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hpcgpt import requeue
from hpcgpt.config import sources
from hpcgpt.distributed import world
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.run import run_folder
from hpcgpt.run.run_folder import Exit
from hpcgpt.storage import lease

TOTAL, SOME = 900, 120
RENEWED_S = 20  # a run without news for two minutes is stale


def main() -> int:
    scenario, *arguments = sys.argv[1:]
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: terminated.append(number))
    if status := requeue.main(["folder", *arguments]):
        return status
    folder, job = sources.from_command_line(arguments, "made", "").run_folder, world.job_start()
    held = lease.acquire(folder, job)
    attempt = {"attempt": held.number}
    host = socket.gethostname()
    run_folder.record(folder, "start", **attempt, job=job, step=0, total_steps=TOTAL, world_size=2, hosts=[host, host])
    run_folder.record(folder, "ready", **attempt, step=0)
    steps = TOTAL if scenario == "finish" else SOME
    write_steps(folder, held.number, steps)
    run_folder.record(folder, "save", **attempt, step=steps, seconds=0.1, stall_s=0.0)
    status = 1
    written = time.monotonic()
    while scenario == "wait" and not terminated:
        time.sleep(0.05)
        if time.monotonic() > written + RENEWED_S:
            write_steps(folder, held.number, steps)
            written = time.monotonic()
    if scenario != "crash":
        status, reason = (AGAIN, "told to terminate") if terminated else (FINISHED, "finished")
        run_folder.write_exit(folder, Exit(job, status, reason, steps, saved=True))
        run_folder.record(folder, "end", **attempt, status=status, reason=reason, step=steps)
        held.release()
    return requeue.main(["decide", "--status", str(status), *arguments])


def write_steps(folder: Path, attempt: int, steps: int) -> None:
    """Write rows of steps that took 1 ms each, the last of which has an evaluation."""
    now = time.time()
    figures = {"attempt": attempt, "train/step_s": 1e-3, "train/tokens_per_s": 64_000.0}
    rows: list[dict[str, Any]] = [
        {"step": step, "time": now + (step - steps) * 1e-3, "tokens": 64 * step, "train/loss": 2 + 8 / step, **figures}
        for step in range(1, steps + 1)
    ]
    rows[-1] |= {"val/loss": 2.5, "val/bits_per_byte": 1.25, "val/elapsed_s": 0.0}
    new = folder / "metrics.new"
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new.replace(folder / "metrics.jsonl")


if __name__ == "__main__":
    sys.exit(main())
