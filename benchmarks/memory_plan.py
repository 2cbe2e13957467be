"""Compare `hpcgpt estimate`'s memory of a rank with what real runs held at their fullest: on a CPU, with gloo.

    python benchmarks/memory_plan.py FOLDER [--sizes small medium large] [--ways ddp ...] [--json FILE]

Each run is `hpcgpt train` with a save while it trains and an evaluation, on two ranks (`alone`: on one). Measured is
the largest resident set of a rank in its life, which the kernel keeps (getrusage(2), ru_maxrss). It has the interpreter
and torch in it, about 0.4 GB: the plan counts them as `framework`, measured in the process that makes the plan. The row
`baseline` is a model of almost nothing, which shows how far that is right; errors are also given without both.

Freed memory goes back to the kernel in these runs (benchmarks/train_returning_memory.py). With --keep-freed it is kept,
as `hpcgpt train` does on a CPU (hpcgpt.model.host_memory), so that gaps between blocks of the heap count, too.

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
from pathlib import Path
from typing import Any

from data_prep import make_shards, train_tokenizer
from data_prep.text import documents, inputs
from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.estimate import devices, estimates, rates
from hpcgpt.estimate.memory import Estimator
from hpcgpt.tokenizer import save_load

ROOT = Path(__file__).resolve().parent.parent
MB = 1e6
# glibc's, see mallopt(3): each block above 128 KiB is mapped by itself, and unmapped when it is freed.
RETURNING = {
    "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "131072",
}  # fmt: skip
# Layers, width, heads, context, vocabulary, micro-batch, micro-steps, steps.
SIZES = {
    "baseline": (1, 32, 1, 32, 512, 1, 1, 2),
    "small": (4, 384, 6, 256, 8192, 8, 2, 2),
    "medium": (6, 512, 8, 512, 16_384, 4, 1, 2),
    "large": (6, 768, 12, 512, 16_384, 4, 1, 2),
}
WAYS: dict[str, tuple[int, list[str]]] = {
    "alone": (1, []),
    "ddp": (2, []),
    "zero1": (2, ["--parallel.mode", "zero1"]),
    "fsdp": (2, ["--parallel.mode", "fsdp"]),
    "activation checkpointing": (2, ["--train.activation_checkpointing", "true"]),
    "loss chunks": (2, ["--train.loss_chunk", "256"]),
    "modern, muon, fsdp": (2, ["--model.kind", "modern", "--optim.name", "muon", "--parallel.mode", "fsdp"]),
}
PUBLISHED = ("ddp", "zero1", "fsdp", "activation checkpointing", "loss chunks")


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.FOLDER).absolute()
    shards = make_shards_of_sources(folder)
    rows: list[dict[str, Any]] = []
    base: dict[str, float] = {}
    with Estimator() as estimator:
        for size in dict.fromkeys(["baseline", *options.sizes]):
            for way in ["ddp"] if size == "baseline" else options.ways:
                row = {"size": size, "way": way} | _compared(size, way, folder, shards, (estimator, options.keep_freed))
                if size == "baseline":
                    base = {"planned": row["planned_mb"], "measured": row["measured_mb"]}
                tensors = row["measured_mb"] - base["measured"]
                row["error"] = row["planned_mb"] / row["measured_mb"] - 1
                row["error_of_tensors"] = (row["planned_mb"] - base["planned"]) / tensors - 1 if tensors > 1 else None
                rows.append(row)
                _print(row)
    if options.json:
        import machine  # loads torch, which would count as this process's memory before its children's

        report = {
            "sizes": {name: list(SIZES[name]) for name in options.sizes},
            "keep_freed": options.keep_freed,
            "machine": machine.about(),
        }
        options.json.write_text(json.dumps(report | {"runs": rows}, indent=1) + "\n")


def make_shards_of_sources(folder: Path) -> Path:
    """Make shards of this project's sources, with a byte-level BPE of 512 ids."""
    shards = folder / "shards"
    if not (shards / "manifest.json").exists():
        text = folder / "text"
        text.mkdir(parents=True, exist_ok=True)
        for path in sorted((ROOT / "hpcgpt").rglob("*.py")):
            name = path.relative_to(ROOT).as_posix().replace("/", "_")
            (text / f"{name}.txt").write_bytes(path.read_bytes())
        unit = inputs.units(inputs.find([str(text)]), 10**9)[0]
        save_load.save(train_tokenizer.train(documents.read_documents(unit), 512, "bpe512"), folder / "tokenizer")
        make_shards.main([
            str(text), "--out", str(shards), "--tokenizer", str(folder / "tokenizer"), "--val-fraction", "0.2",
            "--workers", "1",
        ])  # fmt: skip
    return shards


def _compared(size: str, way: str, folder: Path, shards: Path, how: tuple[Estimator, bool]) -> dict[str, Any]:
    """Plan and run a model of this size in this way. `how`: what plans, and whether freed memory is kept."""
    estimator, keep_freed = how
    layers, width, heads, length, ids, micro_batch, micro_steps, steps = SIZES[size]
    ranks, more = WAYS[way]
    flags = {
        "run.dir": folder / "runs", "run.name": "memory", "run.device": "cpu", "run.threads": 1, "data.dir": shards,
        "data.verify_mb_per_s": 0, "model.n_layer": layers, "model.n_embd": width, "model.n_head": heads,
        "model.block_size": length, "model.vocab_size": ids, "train.steps": steps, "train.micro_batch": micro_batch,
        "train.global_batch": micro_batch * micro_steps * ranks, "checkpoint.every": steps - 1, "eval.every": steps,
        "eval.batches": ranks, "sample.tokens": 0, "tracking.wandb": "disabled", "schedule.warmup_steps": 0,
    }  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key}", str(value))] + more
    planned = plan.make(sources.from_command_line(words, "train", ""), ranks)
    found = estimates.make(
        planned.config, steps=planned.total_steps, ranks=ranks, device=devices.find("cpu"),
        rate=rates.given(1.0, "not asked"), estimator=estimator,
    )  # fmt: skip
    measured = _run(words, ranks, keep_freed)
    shutil.rmtree(folder / "runs")
    peak = found.memory.peak
    return {
        "ranks": ranks,
        "parameters": found.memory.parameters,
        "planned_mb": peak.total / MB,
        "measured_mb": max(measured) / MB,
        "measured_ranks_mb": [figure / MB for figure in measured],
        "phase": peak.phase,
        "parts_mb": {part: held / MB for part, held in peak.parts.items()},
        "phases_mb": {moment.phase: moment.total / MB for moment in found.memory.moments},
        "method": found.memory.method,
    }


def _run(words: list[str], ranks: int, keep_freed: bool) -> list[int]:
    """Train on `ranks` ranks; return the largest resident set of each, in bytes."""
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": secrets.token_hex(4)}
    running = []
    for rank in range(ranks):
        env = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | ({} if keep_freed else RETURNING)
        program = ["-m", "hpcgpt.train"] if keep_freed else [str(ROOT / "benchmarks/train_returning_memory.py")]
        running.append(subprocess.Popen([sys.executable, *program, *words], env=env, stdout=subprocess.DEVNULL))
    found = []
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"a rank ended with status {process.returncode}")
        found.append(usage.ru_maxrss * 1024)
    return found


def _print(row: dict[str, Any]) -> None:
    of_tensors = f", {row['error_of_tensors']:+.1%} of the tensors" if row["error_of_tensors"] is not None else ""
    print(
        f"{row['size']:9} {row['way']:25} planned {row['planned_mb']:7,.0f} MB  measured {row['measured_mb']:7,.0f} MB"
        f"  error {row['error']:+.1%}{of_tensors}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("FOLDER", help="folder for shards and runs")
    names = [name for name in SIZES if name != "baseline"]
    parser.add_argument("--sizes", nargs="+", choices=names, default=names)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(PUBLISHED))
    parser.add_argument("--keep-freed", action="store_true", help="keep freed memory, as `hpcgpt train` does")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
