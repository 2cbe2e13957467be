"""Measure what a run of N steps and E events costs: start, rollback, status, goodput and report.

    python benchmarks/long_run.py [--rows 10000000] [--events 100000] [--folder FOLDER] [--only start status ...]

The run is made up: every field of metrics.jsonl that training writes, an evaluation every 1,000 steps, a tenth of the
events from attempts and the others from saves. Each operation runs in a process of its own: seconds from its start to
its end, interpreter and imports included, CPU seconds, peak memory. "start" and "rollback" open metrics.jsonl as rank 0
does, after a checkpoint 500 steps before the end; "killed" is a start after an attempt that has not closed the file,
and `inside_s` what training waits for, without the copy, which is made beside it. "rebuild" makes metrics.blocks as a
run without one does; then everything is measured with it, and at last "report" without it.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SINCE = 500  # rows since the last checkpoint
STEP_S = 0.5
CLOSED = "metrics.closed"

# What each process runs, with the run's folder, and the step of the checkpoint.
OPEN = """
import sys, time
from pathlib import Path
from hpcgpt.run.metrics_file import MetricsFile
folder, step = Path(sys.argv[1]), int(sys.argv[2])
began = time.perf_counter()
file = MetricsFile(folder / "metrics.jsonl", step + 1)
print(time.perf_counter() - began)
"""
GO_ON = """
row = {"step": step + 1, "tokens": 1, "time": time.time(), "attempt": 9, "train/loss": 3.0, "train/step_s": 0.5}
file.append(row)
file.write_appended()
file.sync()
file.close()
"""
ROLLBACK = """
for number in range(step + 1, step + 501):
    file.append({"step": number, "time": time.time(), "attempt": 9, "train/step_s": 0.5, "train/loss": 3.0})
file.write_appended()
began = time.perf_counter()
file.cut_off(step + 1)
print(time.perf_counter() - began)
file.close()
"""
REBUILD = """
before = -1
while before != file._blocks._at:
    before = file._blocks._at
    file.write_appended()
file.close()
"""
GOODPUT = """
import sys
from pathlib import Path
from hpcgpt.run import goodput
print(goodput.table(Path(sys.argv[1])))
"""
COMMANDS = {
    "start": OPEN + GO_ON, "rollback": OPEN + ROLLBACK, "killed": OPEN + GO_ON, "rebuild": OPEN + REBUILD,
    "goodput": GOODPUT,
}  # fmt: skip
OPERATIONS = ("start", "rollback", "status", "history", "table", "goodput", "report", "killed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="keep the run here")
    parser.add_argument("--code", type=Path, default=ROOT, help="measure another checkout of hpcgpt")
    parser.add_argument("--only", nargs="+", default=["rebuild", *OPERATIONS, "report without blocks"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = (options.folder or Path(temporary)) / f"run{options.rows}"
        if not run.exists():
            made_at = time.perf_counter()
            make_run(run, options.rows, options.events)
            size = (run / "metrics.jsonl").stat().st_size
            print(f"made {size / 1e9:.2f} GB in {time.perf_counter() - made_at:.0f} s", flush=True)
        for name in options.only:
            print(json.dumps(measure(run, name, options.rows, options.code)), flush=True)


def make_run(run: Path, rows: int, events: int) -> None:
    """Write the folder of a run that is saved every few steps, and is killed SINCE steps after its last save."""
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"id": "abcdefghij", "created": 1.7e9}))
    attempts = max(1, events // 100)
    saves_every = max(1, rows // max(1, events * 9 // 20))
    per_attempt = -(-rows // attempts)
    now, attempt = 1.7e9, 0
    with open(run / "metrics.jsonl", "w") as metrics, open(run / "events.jsonl", "w") as records:

        def record(event: str, **fields: Any) -> None:
            records.write(json.dumps({"time": now, "event": event, **fields}) + "\n")

        for step in range(1, rows + 1):
            if (step - 1) % per_attempt == 0:
                attempt = _next_attempt(record, attempt, step - 1, rows, now)
                now += 90
            now += STEP_S
            noise = (step * 7919 % 1000) / 1e5
            loss = 2.8 + 8.0 / (1 + step / 5000) ** 0.5 + noise + (4.0 if step == rows * 2 // 3 else 0.0)
            more = ""
            if step % 1000 == 0:
                more = f', "val/loss": {loss + 0.02}, "val/bits_per_byte": 1.0, "val/elapsed_s": 2.0'
                now += 2.0
            metrics.write(
                f'{{"step": {step}, "tokens": {step * 524288}, "samples": {step * 512}, "time": {now}, "attempt": '
                f'{attempt}, "train/loss": {loss}, "train/lr": {6e-4 + noise}, "train/grad_norm": {0.4 + noise}, '
                f'"train/tokens_per_s": {1e6 + 1e5 * noise}, "train/step_s": {STEP_S}, "train/data_wait_s": 0.001, '
                f'"train/memory_bytes": 41234567890, "train/mfu": 0.45{more}}}\n'
            )
            if step % saves_every == 0 and step <= rows - SINCE:
                record("save", attempt=attempt, step=step, seconds=3.0, stall_s=0.2, bytes=1_500_000_000)
                record("save_stall", attempt=attempt, step=step, stall_s=0.0)
                now += 0.2


def _next_attempt(record: Any, before: int, step: int, rows: int, now: float) -> int:
    """Record the end of an attempt, and the start of the next one; return its number."""
    job, after = f"7_{before - 1}", f"7_{before}"
    if before:
        reason = "the time limit is near"
        record("stop", attempt=before, step=step, reason=reason)
        record("end", attempt=before, job=job, status=75, reason=reason, step=step)
        record("requeue", job=job, reason=reason)
    record("job", job=after, queued_at=now, started_at=now + 10, hosts=["n1", "n2"], newest_step=step)
    about = {"attempt": before + 1, "job": after, "step": step}
    record("start", **about, total_steps=rows, world_size=8, host="n1", hosts=["n1", "n2"], began_at=now + 20)
    record("about", attempt=before + 1, parameters=124_000_000, gpus=8, device="NVIDIA H100 80GB HBM3",
           commit="0123456789abcdef", dirty=False, versions={"python": "3.12.1", "torch": "2.11.0"})  # fmt: skip
    record("ready", **about, warm_up_s=20.0, load_s=4.0)
    for number in range(3):
        record("straggler", attempt=before + 1, step=step + number, rank=3, host="n2", local_s=1.0, usual_s=0.5,
               factor=2.0)  # fmt: skip
    return before + 1


def measure(run: Path, name: str, rows: int, code: Path) -> dict[str, Any]:
    """Run an operation in a new process, and measure that."""
    if name == "killed":
        (run / CLOSED).unlink(missing_ok=True)
    if name == "report without blocks":
        (run / "metrics.blocks").unlink(missing_ok=True)
    out = run.with_suffix(".html")
    command = [sys.executable, "-c", COMMANDS[name], str(run), str(rows - SINCE)] if name in COMMANDS else [
        sys.executable, "-m", *{
            "status": ["hpcgpt.status", str(run)],
            "history": ["hpcgpt.status", str(run), "--history"],
            "table": ["hpcgpt.status", "--run.dir", str(run.parent)],
        }.get(name, ["hpcgpt.report", str(run), "-o", str(out)])
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as output:
        began_at = time.perf_counter()
        process = subprocess.Popen(command, cwd=code, stdout=output)
        _, status, used = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - began_at
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        printed = output.read()
    found = {
        "operation": name, "rows": rows, "seconds": round(elapsed_s, 2), "status": process.returncode,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2), "peak_mb": round(used.ru_maxrss * 1024 / 1e6),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    if name in ("start", "rollback", "killed", "rebuild"):
        found["inside_s"] = [round(float(line), 3) for line in printed.split()]
    return found


if __name__ == "__main__":
    main()
