"""Measure the memory of make_shards: every process, over the whole run, on a small and on a large corpus.

    python benchmarks/corpus.py .cache/bench
    python benchmarks/memory.py .cache/bench [--sizes 0.3 3] [--ways gigatoken:chinese ...] [--json FILE]

A corpus of that many GB is a file of benchmarks/corpus.py, repeated; it is removed afterwards. While
`make_shards --workers 2` runs, /proc/PID/smaps_rollup of each of its processes is read every 50 ms:

    Rss       what the process has in memory, shared or not: its peak is also VmHWM, which the kernel keeps
    Pss       the same with every shared page divided by the number of processes that share it: these add up
    private   Private_Dirty: pages that it has written and does not share, so neither code nor mapped files

Mapped files count in Rss while they are read (a finished shard is, for its checksum), though the kernel may drop them
at any time. So `private` is the best measure of what a worker needs. Peaks are of each process, and of the sum of Pss.

Flat means that the large corpus needs no more than the small one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERY_S = 0.05
MB = 1e6


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.DIR).absolute()
    rows = []
    for way in options.ways:
        backend, _, name = way.partition(":")
        for size in options.sizes:
            source = folder / "memory.jsonl"
            try:
                _repeat(folder / f"{name}.jsonl", source, int(size * 1e9))
                rows.append({"backend": backend, "text": name} | _measured(source, folder / "memory.out", backend))
            finally:
                source.unlink(missing_ok=True)
            _print(rows[-1])
    report = {"workers": 2, "sampled_every_s": EVERY_S, "python": platform.python_version(), "runs": rows}
    report |= {"load_average": os.getloadavg(), "kernel": platform.release()}
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


def _repeat(source: Path, target: Path, size: int) -> None:
    content = source.read_bytes()
    with open(target, "wb") as file:
        file.writelines(content for _ in range(-(-size // len(content))))


def _measured(source: Path, out: Path, backend: str) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "data_prep.make_shards", str(source), "--out", str(out), "--workers", "2"]
    started_at = time.monotonic()
    process = subprocess.Popen(
        [*words, "--backend", backend], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    peaks: dict[int, dict[str, Any]] = {}
    together, samples = 0.0, 0
    while process.poll() is None:
        now = {pid: _sample(pid) for pid in _members(process.pid)}
        for pid, found in now.items():
            peak = peaks.setdefault(pid, {"what": "", "pss_mb": 0.0, "rss_mb": 0.0, "private_mb": 0.0, "hwm_mb": 0.0})
            peak["what"] = found.pop("what", "") or peak["what"]
            for key, value in found.items():
                peak[key] = max(peak[key], value)
        together = max(together, sum(found.get("pss_mb", 0.0) for found in now.values()))
        samples += 1
        time.sleep(EVERY_S)
    elapsed_s = time.monotonic() - started_at
    if process.returncode:
        raise SystemExit(f"make_shards failed with status {process.returncode}")
    manifest = json.loads((out / "manifest.json").read_bytes())
    shutil.rmtree(out)
    return {
        "input_gb": source.stat().st_size / 1e9,
        "tokens": sum(shard["tokens"] for shard in manifest["shards"]),
        "elapsed_s": elapsed_s,
        "samples": samples,
        "all_pss_mb": together,
        "processes": sorted(peaks.values(), key=lambda peak: (peak["what"], -peak["pss_mb"])),
    }


def _members(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.name))
    return found


def _sample(pid: int) -> dict[str, Any]:
    """Read a process's memory; {} if it has just ended."""
    folder = Path(f"/proc/{pid}")
    try:
        rollup = _fields(folder / "smaps_rollup")
        status = _fields(folder / "status")
    except OSError:
        return {}
    return {
        "what": _what(pid),
        "pss_mb": rollup.get("Pss", 0) / MB,
        "rss_mb": rollup.get("Rss", 0) / MB,
        "private_mb": rollup.get("Private_Dirty", 0) / MB,
        "hwm_mb": status.get("VmHWM", 0) / MB,
    }


def _fields(path: Path) -> dict[str, int]:
    """Parse the lines ``Name:   12 kB`` of a file, in bytes."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


def _what(pid: int) -> str:
    """Name a process: the command, or a worker, which is forked from it and has the same command line."""
    with suppress(OSError):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        lines = [Path(f"/proc/{number}/cmdline").read_bytes() for number in (pid, parent)]
        return "worker" if lines[0] == lines[1] else "command"
    return ""


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['backend']} on {row['input_gb']:.2f} GB of {row['text']}: {row['tokens']:,} tokens in "
        f"{row['elapsed_s']:.0f} s, all processes {row['all_pss_mb']:.0f} MB (Pss), {row['samples']} samples"
    )
    for peak in row["processes"]:
        print(
            f"  {peak['what']:8} private {peak['private_mb']:6.0f}  Pss {peak['pss_mb']:6.0f}  "
            f"Rss {peak['rss_mb']:6.0f}  VmHWM {peak['hwm_mb']:6.0f} MB",
            flush=True,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("DIR", help="what benchmarks/corpus.py made")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.3, 3.0], metavar="GB")
    ways = ["gigatoken:english", "gigatoken:chinese"]
    parser.add_argument("--ways", nargs="+", default=ways, metavar="BACKEND:TEXT")
    parser.add_argument("--json", help="file for the figures")
    return parser


if __name__ == "__main__":
    main()
