"""Measure `hpcgpt report`: size of the page, seconds and peak memory, for runs of 10 to a million steps.

    python benchmarks/report.py [--steps 10 10000 1000000] [--folder FOLDER]

The runs are made up: every field of metrics.jsonl that training writes, an evaluation every 250 steps, a sample with
each, an attempt every 1,000 steps or 50 in all, one spike of a single step. Each page is made by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.report.made_up import make_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 10_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="keep the runs and pages here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for steps in options.steps:
            run = folder / f"run{steps}"
            if not run.exists():
                make_run(run, steps)
            print(json.dumps(measure(run, folder / f"run{steps}.html", steps)), flush=True)


def measure(run: Path, page: Path, steps: int) -> dict[str, Any]:
    """Make the page of a run in a new process, and measure that."""
    started_at = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "hpcgpt.report", str(run), "-o", str(page)],
                               stdout=subprocess.DEVNULL)  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    elapsed_s = time.perf_counter() - started_at
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"hpcgpt report ended with {process.returncode}")
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return {
        "steps": steps, "metrics_mb": round((run / "metrics.jsonl").stat().st_size / 1e6, 1),
        "page_kb": round(page.stat().st_size / 1e3, 1), "seconds": round(elapsed_s, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mb": round(used.ru_maxrss * kilobyte / 1e6), "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
