"""Measure the time from a SIGKILL to the first new step, and its parts.

    make quickstart                 (for its shards)
    python benchmarks/restart.py [--config quickstart] [--rounds 5] [--json FILE]

A run of the configuration, on this machine and without Slurm, is killed at a random moment and started again at once,
--rounds times. The parts are those of the event "ready" in events.jsonl; before them is the start of the interpreter,
after them the first step. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hpcgpt.run import run_folder

LIMIT_S = 300.0


def main() -> None:
    options = _parser().parse_args()
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        words = [sys.executable, "-m", "hpcgpt.train", options.config, "--run.dir", folder, "--run.name", "killed"]
        words += ["--checkpoint.every", "25", "--eval.every", "0", "--tracking.wandb", "disabled", *options.training]
        run = Path(folder) / "killed"
        for number in range(options.rounds + 1):
            killed_at = time.time()
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                first = _first_row(run, killed_at, process)
                if number:  # the first one starts from nothing
                    found.append(_parts(run, killed_at, first))
                _wait(lambda more=number: len(_saves(run)) > more, process)
                time.sleep(random.uniform(0.0, 2.0))
            finally:
                process.kill()
                process.wait()
    medians = {name: statistics.median(part[name] for part in found) for name in found[0]}
    for name, seconds in medians.items():
        print(f"{name:22} {seconds:6.2f} s")
    if options.json:
        report: dict[str, Any] = {"config": options.config, "medians_s": medians, "rounds": found}
        report |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _first_row(run: Path, after: float, process: subprocess.Popen[bytes]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    def there() -> bool:
        rows[:] = [row for row in run_folder.read_rows(run / "metrics.jsonl") if row["time"] > after]
        return bool(rows)

    _wait(there, process)
    return rows[0]


def _saves(run: Path) -> list[dict[str, Any]]:
    return [event for event in run_folder.events(run) if event["event"] == "save"]


def _parts(run: Path, killed_at: float, first: dict[str, Any]) -> dict[str, float]:
    events = run_folder.events(run)
    start = next(event for event in reversed(events) if event["event"] == "start")
    ready = next(event for event in reversed(events) if event["event"] == "ready")
    names = ("imports_s", "meet_s", "warm_up_s", "load_s")
    parts = {"interpreter": start["began_at"] - killed_at} | {name[:-2]: ready[name] for name in names}
    parts["first step"] = first["time"] - ready["time"]
    total = first["time"] - killed_at
    return parts | {"the rest": total - sum(parts.values()), "from kill to new step": total}


def _wait(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run has ended (status {process.poll()}), or made no progress in {LIMIT_S:.0f} s")
        time.sleep(0.02)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", default=".", help="a folder on the disk to measure (default: this one)")
    parser.add_argument("--json", help="write the figures to this file, too")
    parser.add_argument("training", nargs="*", help="more flags of `hpcgpt train`, after --")
    return parser


if __name__ == "__main__":
    main()
