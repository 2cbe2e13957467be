"""Measure what a failing W&B server costs a run, and which rows it has in the end.

    python benchmarks/tracking.py [--seconds 45] [--outage 60] [--json FILE]

A small model is trained on this machine, once without wandb and once for each way in which the server can fail; the
server is a stand-in on loopback (hpcgpt/drill/wandb_server.py), the client is the real wandb. Each run is stopped by
SIGTERM after --seconds of steps. Prints for each of them

    median, longest    the time between two steps. The longest one has stops of the machine in it, too: compare it
                       with the case "disabled"
    reporting          the longest time that a step waited for all reporting, of which tracking is a part
    exit               from SIGTERM to the end of the process
    rows               those that the server has: at the end of the run, and after `python -m hpcgpt.tracking sync`,
                       which runs when the server answers again; of those that metrics.jsonl has; `twice` counts rows
                       that the server has more than once

In the case "killed", all processes of the run get SIGKILL 16 s after the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import machine

from hpcgpt.drill.drill import make_shards
from hpcgpt.drill.wandb_server import Mode, WandbServer
from hpcgpt.run import run_folder

LIMIT_S = 300.0
KILLED_AFTER_S, OUT_AFTER_S, BACK_S = 16.0, 20.0, 30.0
TRAINING = (
    "--run.device", "cpu", "--run.threads", "1", "--model.n_layer", "4", "--model.n_head", "4", "--model.n_embd", "128",
    "--model.block_size", "64", "--train.micro_batch", "4", "--train.global_batch", "4", "--train.dtype", "float32",
    "--train.steps", "1000000", "--checkpoint.every", "1000000", "--eval.every", "0", "--sample.tokens", "0",
)  # fmt: skip
COLUMNS = ("case", "median ms", "longest ms", "reporting ms", "exit s", "rows due", "at the end", "after sync", "twice")


def main() -> None:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        bench = Bench(Path(folder), options.seconds, options.outage)
        found = [bench.measure(name) for name in options.cases.split(",")]
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "---:|" * (len(COLUMNS) - 1))
    for case in found:
        print("| " + " | ".join(_cell(case[column]) for column in COLUMNS) + " |")
    if options.json:
        report = {"seconds": options.seconds, "outage_s": options.outage, "machine": machine.about(), "cases": found}
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


class Bench:
    def __init__(self, home: Path, seconds: float, outage_s: float) -> None:
        self._home, self._seconds, self._outage_s = home, seconds, outage_s
        self._cases: dict[str, Callable[[WandbServer, subprocess.Popen[bytes]], None]] = {
            "disabled": self._leave,
            "healthy": self._leave,
            "silent": self._leave,
            "500": self._leave,
            "refused": self._leave,
            "outage": self._outage,
            "killed": self._kill,
        }
        make_shards(home, home / "shards", lambda text: print(text, file=sys.stderr))

    def measure(self, name: str) -> dict[str, Any]:
        """Train in the case of this name, and count steps and rows."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        modes: dict[str, Mode] = {"silent": "silent", "500": "failing", "refused": "refusing"}
        server = WandbServer()
        try:
            server.mode = modes.get(name, "healthy")
            return self._measure(name, server)
        finally:
            server.close()

    def _measure(self, name: str, server: WandbServer) -> dict[str, Any]:
        run, wanted = self._home / name, "disabled" if name == "disabled" else "auto"
        timing = self._home / f"{name}.json"
        words = [sys.executable, str(Path(__file__).with_name("train_timing_reports.py")), str(timing)]
        words += ["--run.dir", str(self._home), "--run.name", name]
        words += ["--data.dir", str(self._home / "shards"), "--tracking.wandb", wanted, *TRAINING]
        env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | server.environ()
        with open(self._home / f"{name}.log", "wb") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=env)
            try:
                _wait(lambda: bool(run_folder.read_rows(run / "metrics.jsonl")), process)
                self._cases[name](server, process)
                signalled_at = time.monotonic()
                process.send_signal(signal.SIGTERM)
                process.wait(LIMIT_S)
                exit_s = time.monotonic() - signalled_at
            finally:
                if process.poll() is None:
                    _kill_tree(process.pid)
                    process.wait()
        rows = run_folder.read_rows(run / "metrics.jsonl")
        gaps = [later["time"] - row["time"] for row, later in pairwise(rows)]
        run_id = run_folder.run_id(run)
        at_the_end = len(set(server.steps(run_id)))
        if wanted != "disabled":
            server.mode = "healthy"
            sync = [sys.executable, "-m", "hpcgpt.tracking", "sync", str(run)]
            subprocess.run(sync, env=env, check=True, timeout=LIMIT_S)
        steps = Counter(server.steps(run_id))
        figures: tuple[Any, ...] = (
            name, 1000 * statistics.median(gaps), 1000 * max(gaps), 1000 * json.loads(timing.read_text())["longest_s"],
            None if name == "killed" else exit_s, len(rows),
            at_the_end, len(steps.keys() & {row["step"] for row in rows}), len([n for n in steps.values() if n > 1]),
        )  # fmt: skip
        if wanted == "disabled":
            figures = (*figures[:5], None, None, None, None)
        return dict(zip(COLUMNS, figures, strict=True))

    def _leave(self, _server: WandbServer, _process: subprocess.Popen[bytes]) -> None:
        time.sleep(self._seconds)

    def _outage(self, server: WandbServer, _process: subprocess.Popen[bytes]) -> None:
        time.sleep(OUT_AFTER_S)
        server.mode = "silent"
        time.sleep(self._outage_s)
        server.mode = "healthy"
        time.sleep(BACK_S)

    def _kill(self, _server: WandbServer, process: subprocess.Popen[bytes]) -> None:
        time.sleep(KILLED_AFTER_S)
        _kill_tree(process.pid)


def _kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and all of its descendants, as when a node fails."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    tree = [pid] if pid in parents else []
    for parent in tree:
        tree += [child for child, its_parent in parents.items() if its_parent == parent]
    for each in tree:
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the run has ended (status {process.poll()}), or made no step in {LIMIT_S:.0f} s")
        time.sleep(0.1)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="of steps, in each case; default: %(default)g")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds; default: %(default)g")
    parser.add_argument("--cases", default="disabled,healthy,silent,500,refused,outage,killed")
    parser.add_argument("--dir", default=".", help="a folder on the disk to measure (default: this one)")
    parser.add_argument("--json", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
