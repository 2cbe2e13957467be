"""Train a model with fsdp where no rank may hold all of its weights; print the peak memory of each rank.

    python benchmarks/large_model.py FOLDER [--ranks 4] [--layers 24] [--width 1024] [--limit-mb MB] [--code CHECKOUT]

Every rank is a process on this machine with gloo and one thread, which trains three steps, saves after the second while
the third runs, evaluates and samples after the third, and saves. Then it is started again, under the same limit, and
trains one more. Freed memory goes back to the kernel (benchmarks/train_returning_memory.py), as it does on the hosts of
GPUs.

The limit is RLIMIT_DATA (getrlimit(2)): what a process may allocate. (One of the address space would say little, as
the libraries reserve gigabytes of it: tests/checkpoint/limited_memory.py resumes under one.) By default it is what the
ranks need at their fullest by arithmetic, which a rank with all of the weights beside its shards would exceed: with
AdamW a rank of R holds weights, gradients and two moments (4 N / R for N bytes of weights), and the copy of a
checkpoint that is being written (3 N / R). With 4 ranks that is 1.75 N, with 16 less than half of N: then the limit of
a large model is below N itself. Peak is the largest resident set of a rank, which the kernel keeps (getrusage(2),
ru_maxrss), with interpreter and torch in it. --code runs another checkout, as of an older commit, with the same limit.

FOLDER holds shards of this project's sources, and the run, which is removed. `python benchmarks/large_model.py` needs
R times the limit in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory_plan import RETURNING, make_shards_of_sources

from hpcgpt.config.options import Model
from hpcgpt.estimate import analytic

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
FRAMEWORK_MB = 700  # interpreter, torch, stacks of threads, and what a step of a block computes
STEPS = 3


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.FOLDER).absolute()
    shards = make_shards_of_sources(folder)
    model = Model(
        n_layer=options.layers, n_head=options.width // 64, n_embd=options.width, block_size=64, vocab_size=512
    )
    weights_mb = 4 * analytic.parameter_count(model) / MB
    table_mb = 4 * analytic.table_parameters(model) / MB
    # The tables are gathered as a whole, and so are their gradients.
    limit_mb = options.limit_mb or 7 * weights_mb / options.ranks + 4 * table_mb + FRAMEWORK_MB
    print(f"{options.ranks} ranks, weights {weights_mb:,.0f} MB, limit of a rank {limit_mb:,.0f} MB", flush=True)
    report: dict[str, Any] = {"ranks": options.ranks, "weights_mb": weights_mb, "limit_mb": limit_mb}
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for name, steps in (("trained", STEPS), ("continued", STEPS + 1)):
        words = _words(folder, shards, model, options.ranks, steps)
        report[name] = found = _run(words, options.ranks, limit_mb, Path(options.code).absolute())
        peaks = ", ".join(f"{peak:,.0f}" for peak in found["peaks_mb"])
        print(
            f"{name:9} status {found['status']} after {found['seconds']:.0f} s, peak MB of each rank {peaks}",
            flush=True,
        )
        if found["status"]:
            print(found["last"])
            break
    else:
        report["rows"] = _rows(folder / "runs" / "large")
        print(*report["rows"], sep="\n")
    shutil.rmtree(folder / "runs", ignore_errors=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _words(folder: Path, shards: Path, model: Model, ranks: int, steps: int) -> list[str]:
    flags = {
        "run.dir": folder / "runs", "run.name": "large", "run.device": "cpu", "run.threads": 1, "data.dir": shards,
        "run.rendezvous_timeout_s": 300, "data.verify_mb_per_s": 0, "model.n_layer": model.n_layer,
        "model.n_embd": model.n_embd, "model.n_head": model.n_head, "model.block_size": model.block_size,
        "model.vocab_size": model.vocab_size, "train.steps": steps, "train.micro_batch": 1, "train.global_batch": ranks,
        "parallel.mode": "fsdp", "checkpoint.every": 2, "eval.every": STEPS, "eval.batches": ranks + 1,
        "sample.tokens": 5, "tracking.wandb": "disabled", "schedule.warmup_steps": 0, "schedule.kind": "constant",
    }  # fmt: skip
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def _run(words: list[str], ranks: int, limit_mb: float, code: Path) -> dict[str, Any]:
    """Train on `ranks` ranks, each limited; return status, seconds, and the largest resident set of each."""
    limit = int(limit_mb * MB)
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": secrets.token_hex(4)}
    running, started_at = [], time.monotonic()
    for rank in range(ranks):
        env = os.environ | place | RETURNING
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(code)}
        running.append(
            subprocess.Popen(
                [sys.executable, str(code / "benchmarks/train_returning_memory.py"), *words],
                env=env,
                cwd=code,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            )
        )
    peaks, last, status = [], "", 0
    for process in running:
        assert process.stderr
        said = process.stderr.read().strip().splitlines()
        _, code_of_exit, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(code_of_exit)
        peaks.append(usage.ru_maxrss * 1024 / MB)
        if process.returncode and not status:
            status, last = process.returncode, "\n".join(said[-3:])
    return {"status": status, "seconds": time.monotonic() - started_at, "peaks_mb": peaks, "last": last}


def _rows(run: Path) -> list[str]:
    """Return what the run did, a line each."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        figures = {key: row[key] for key in ("train/loss", "val/loss") if key in row}
        found.append(f"step {row['step']}: " + ", ".join(f"{key} {value:.4f}" for key, value in figures.items()))
    found += sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    if (run / "samples.jsonl").exists():
        found.append(f"{len((run / 'samples.jsonl').read_text().splitlines())} sample(s)")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FOLDER", help="folder for shards and runs")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--limit-mb", type=float, metavar="MB", help="limit of a rank (default: by arithmetic)")
    parser.add_argument("--code", default=ROOT, metavar="CHECKOUT", help="the code that trains (default: this one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
