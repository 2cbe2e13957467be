"""Run folders made by hand, with records of any time, and Slurm's answers about their jobs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from hpcgpt.run import run_folder as run_folder_module
from hpcgpt.slurm.queue import Presence, Queue

NOW = 10_000.0


def run_folder(
    tmp_path: Path, *events: tuple[float, str, dict[str, Any]], steps: int = 0, held: bool = True, name: str = "run"
) -> Path:
    """Make a run whose events happened the given seconds before NOW; its steps of 1 s end right before NOW."""
    folder = tmp_path / name
    run_folder_module.prepare(folder)
    lines = [json.dumps({"time": NOW - ago, "event": name, **fields}) for ago, name, fields in events]
    (folder / "events.jsonl").write_text("\n".join([*lines, '{"torn']))
    metrics = [{"step": n, "time": NOW - steps + n, "attempt": 1, "train/step_s": 1.0, "tokens": n, "train/loss": 2.0,
                "train/tokens_per_s": 9.0} for n in range(1, steps + 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + '{"torn')
    (folder / "generations").mkdir()
    # Another host: a process with this pid on this host says nothing about it.
    holder = {"host": "elsewhere", "pid": os.getpid(), "attempt": "7_0"}
    (folder / "generations/000001.json").write_text(json.dumps(holder))
    if not held:
        (folder / "generations/000001.done").touch()
    return folder


def squeue(*lines: str, status: int = 0, problem: str = "") -> Queue:
    """Return a Queue that Slurm answers with these lines: id|state|start|end|nodes|reason."""
    asked: list[tuple[str, ...]] = []

    def run(*command: str) -> CompletedProcess[str]:
        asked.append(command)
        return CompletedProcess(command, status, "".join(f"{line}\n" for line in lines), problem)

    queue = Queue(run=run)
    queue.asked = asked  # type: ignore[attr-defined]
    return queue


def answering(presence: Presence) -> Queue:
    """Return a Queue with this answer about every job that the tests use."""
    states = {"pending": "PENDING|N/A|N/A||Priority", "held": "PENDING|N/A|N/A||JobHeldUser",
              "there": "RUNNING|1|2|n1|None", "gone": "CANCELLED|1|2||None"}  # fmt: skip
    ids = ("7", "8", "9")
    queue = squeue(*(f"{id_}|{states[presence]}" for id_ in ids if presence in states), status=presence == "unknown")
    queue.load(ids)
    return queue
