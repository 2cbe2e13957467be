"""Compare the time that `hpcgpt estimate --probe` predicts with what a real run then takes: on CPUs, without Slurm.

    python benchmarks/probe.py FOLDER [--steps N] [--repeats N] [--ways NAME ...] [--json FILE]

For each configuration, as often as --repeats says and one after the other, so that both see the same machine: a probe,
then the run itself, from the start of its processes to their end, with its evaluations and saves. Shown are the medians
over the repeats of predicted / measured: of the steps, of evaluations, of all but the start, and of all.

FOLDER holds shards of this project's sources, and the runs, which are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import memory_plan

from hpcgpt.run import attempts, goodput

ROOT = Path(__file__).resolve().parent.parent
# Ranks, and flags: layers, width, heads and context of the models differ, and what beside steps takes time.
BASE = {"n_layer": 2, "n_embd": 128, "n_head": 4, "block_size": 128}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "ddp": (2, {}),
    "fsdp, modern, muon": (2, {"parallel.mode": "fsdp", "model.kind": "modern", "optim.name": "muon"}),
    "activation checkpointing": (1, {"train.activation_checkpointing": "true", "model.n_layer": 4}),
    "long evaluations": (2, {"eval.every": 20, "eval.batches": 16, "sample.tokens": 50}),
    "many saves": (1, {"checkpoint.every": 20, "model.n_embd": 256}),
}


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.FOLDER).absolute()
    shards = memory_plan.make_shards_of_sources(folder)
    rows: list[dict[str, Any]] = []
    for way in options.ways:
        tries = [_compared(way, folder, shards, options.steps) for _ in range(options.repeats)]
        row = {"way": way, "ranks": WAYS[way][0], "tries": tries}
        for name in ("steps", "evaluations", "running", "all"):
            row[name] = median(one["predicted_s"][name] / one["measured_s"][name] for one in tries)
        rows.append(row)
        took = median(one["measured_s"]["all"] for one in tries)
        print(
            f"{way:26} {took:6.1f} s  predicted/measured: steps {row['steps']:.2f}, evaluations "
            f"{row['evaluations']:.2f}, without the start {row['running']:.2f}, all {row['all']:.2f}",
            flush=True,
        )
    if options.json:
        import machine  # loads torch

        options.json.write_text(json.dumps({"machine": machine.about(), "runs": rows}, indent=1) + "\n")


def _compared(way: str, folder: Path, shards: Path, steps: int) -> dict[str, Any]:
    """Predict and run one configuration; return seconds of its parts."""
    ranks, more = WAYS[way]
    flags = {
        **{f"model.{key}": value for key, value in BASE.items()},
        "run.dir": folder / "runs", "run.name": "measured", "run.device": "cpu", "run.threads": 1, "data.dir": shards,
        "train.steps": steps, "train.micro_batch": 4, "train.global_batch": 8, "eval.every": 50, "eval.batches": 8,
        "checkpoint.every": 70, "sample.tokens": 10, "tracking.wandb": "disabled", "schedule.warmup_steps": 5, **more,
    }  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command = [sys.executable, "-m", "hpcgpt.estimate", "--ranks", str(ranks), "--probe", "--json", *words]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    predicted = json.loads(answer.stdout)["time"]
    took_s = _run(words, ranks)
    spent = goodput.measure(*attempts.read(folder / "runs" / "measured"))
    shutil.rmtree(folder / "runs")
    start_s, real_start_s = predicted["habits"]["start_s"], spent.restart_s + spent.compile_s
    return {
        "predicted_s": {
            "steps": predicted["seconds"], "evaluations": predicted["evaluation_s"], "all": predicted["total_s"],
            "running": predicted["total_s"] - start_s, "start": start_s, "save": predicted["habits"]["save_s"],
        },
        "measured_s": {
            "steps": spent.productive_s, "evaluations": spent.evaluation_s, "all": took_s,
            "running": took_s - real_start_s, "start": real_start_s, "other": spent.other_s,
            "stalls": spent.save_stall_s,
        },
    }  # fmt: skip


def _run(words: list[str], ranks: int) -> float:
    """Train on `ranks` ranks of this machine; return the seconds until all have ended."""
    job = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": secrets.token_hex(4)}
    began_at = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "hpcgpt.train", *words],
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(ranks)
    ]
    for process in running:
        if process.wait():
            raise SystemExit(f"a rank ended with status {process.returncode}")
    return time.monotonic() - began_at


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FOLDER", help="folder for shards and runs")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps of the real run (default: 200)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="probes and runs of each way (default: 3)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
