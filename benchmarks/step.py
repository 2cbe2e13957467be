"""Time one rank's training step with several settings, in turns: compilation, precision and attention kernels.

    python benchmarks/step.py --data data/quickstart/shards [--config gpt2-124m] [--micro-batch 8] [--micro-steps 1]
        [--rounds 5] [--steps 10] [--ways NAME ...] [--device cuda] [--setup-s SECONDS]
        [--json benchmarks/results/step.json]

Each setting has an engine as in `hpcgpt train`, with the same initial weights and the same samples. In each round each
engine makes --steps steps, in a new order; figures are medians over the rounds. Steps are launched and read as in the
training loop. "Between" is the fraction of the time outside of steps: reading metrics, and whatever keeps the host from
launching early enough. Settings that this machine does not support are left out, with the reason. All engines are in
memory at the same time: if that is too much for a GPU, name some with --ways. The JSON is written after each round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

import machine
import torch

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.model import host_memory, precision
from hpcgpt.training.engine import Engine, PendingStep

# Beside the fastest way, each alone. From torch 2.13 on, backward passes on a GPU are compiled without the compiler's
# deterministic mode here, which is a setting of the process then: benchmarks/against_nanogpt.py has the whole price.
OPTIONS: dict[str, dict[str, Any]] = {
    "deterministic": {"deterministic": True},
    "document mask": {"data.document_mask": True},
    "activation checkpointing": {"activation_checkpointing": True},
    "loss chunks": {"loss_chunk": 4096},
    "muon": {"optim.name": "muon"},
}


@dataclasses.dataclass
class Way:
    """`flags`: options of [train], and of another section as "section.key"."""

    flags: dict[str, Any]
    engine: Engine | None = None
    step: int = 0
    warm_up_s: float = 0.0


def main() -> None:
    options = _parser().parse_args()
    device = torch.device(options.device)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of all ways: deterministic needs it
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if device.type == "cpu":
        host_memory.keep_freed()
    ranks = world.Ranks(world.World(0, 0, 1, 1, "alone", "benchmark"), device, None)
    ways = _ways(device)
    if options.ways:
        if unknown := set(options.ways) - set(ways):
            raise SystemExit(f"--ways: there is no {'; '.join(unknown)} here, but {'; '.join(ways)}")
        ways = {name: ways[name] for name in options.ways}
    refused = {}
    began_at = time.perf_counter()
    for name, way in list(ways.items()):
        started_at = time.perf_counter()
        try:
            if started_at - began_at > options.setup_s:
                raise RuntimeError("the time of --setup-s is over")
            way.engine = Engine(plan.make(_config(options, way.flags), 1), ranks)
            way.engine.warm_up()
            _steps(way, 3, device)
        except (RuntimeError, ValueError) as error:
            refused[name] = str(error).splitlines()[0]
            print(f"{name:28} left out: {refused[name]}", flush=True)
            del ways[name]
            continue
        way.warm_up_s = time.perf_counter() - started_at
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name in random.sample(sorted(ways), len(ways)):
            found[name].append(_steps(ways[name], options.steps, device))
        result = _medians(ways, found)
        if options.json:
            _write(options, result, refused, len(next(iter(found.values()), [])))
    for name, figures in result.items():
        print(f"{name:28} " + "  ".join(f"{key} {value:,.4g}" for key, value in figures.items()), flush=True)


def _medians(ways: dict[str, Way], found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the medians over the rounds so far."""
    return {
        name: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        | {"warm_up_s": ways[name].warm_up_s}
        for name, rounds in found.items()
    }


def _write(options: argparse.Namespace, result: dict[str, Any], refused: dict[str, str], rounds: int) -> None:
    model = plan.make(_config(options, {}), 1).config.model
    about = {
        "model": dataclasses.asdict(model), "micro_batch": options.micro_batch, "micro_steps": options.micro_steps,
        "rounds": rounds, "steps": options.steps, "machine": machine.about(),
    }  # fmt: skip
    unfinished = options.json.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(about | {"ways": result, "left_out": refused}, indent=1) + "\n")
    unfinished.replace(options.json)


def _ways(device: torch.device) -> dict[str, Way]:
    on_gpu = device.type == "cuda"
    ways = {}
    for name, dtype in (("float32", "float32"), ("bf16", "bfloat16")):
        if dtype == "float32" or on_gpu or precision.cpu_has_bf16():
            ways[name] = Way({"dtype": dtype, "compile": "off"})
            ways[f"{name}, compiled"] = Way({"dtype": dtype, "compile": "on"})
    if on_gpu:
        for kernel in ("flash", "cudnn", "efficient", "fa3"):
            ways[f"bf16, compiled, {kernel}"] = Way({"dtype": "bfloat16", "compile": "on", "attention": kernel})
    fastest = "bf16, compiled" if "bf16, compiled" in ways else "float32, compiled"
    for name, flags in OPTIONS.items():
        ways[f"{fastest}, {name}"] = Way(ways[fastest].flags | flags)
    # Those that say most come first: --setup-s may end before the last.
    return {fastest: ways[fastest]} | dict(sorted(ways.items(), key=_importance))


def _importance(way: tuple[str, Way]) -> bool:
    return way[0].startswith("float32")


def _config(options: argparse.Namespace, flags: dict[str, Any]) -> Config:
    settings = sources.from_file(sources.find(options.config))
    changes: dict[str, dict[str, Any]] = {
        "train": {"micro_batch": options.micro_batch, "global_batch": options.micro_batch * options.micro_steps},
        "data": {"dir": str(options.data), "mix": ()},
    }
    for key, value in flags.items():
        section, _, name = key.rpartition(".")
        changes.setdefault(section or "train", {})[name] = value
    sections = {name: dataclasses.replace(getattr(settings, name), **values) for name, values in changes.items()}
    return dataclasses.replace(settings, **sections)


def _steps(way: Way, count: int, device: torch.device) -> dict[str, float]:
    """Run steps as the training loop does: the metrics of a step are read when the next one has been launched."""
    engine = way.engine
    assert engine is not None
    rows: list[dict[str, Any]] = []
    unread: PendingStep | None = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    started_at = time.perf_counter()
    for _ in range(count):
        pending_step = engine.launch(way.step, way.step)
        way.step += 1
        if unread is not None:
            rows.append(engine.read(unread))
        unread = pending_step
    assert unread is not None
    rows.append(engine.read(unread))
    elapsed_s = time.perf_counter() - started_at
    found = {
        "step_s": elapsed_s / count,
        "tokens_per_s": rows[-1]["train/tokens_per_s"] * rows[-1]["train/step_s"] * count / elapsed_s,
        "between": 1 - sum(row["train/step_s"] for row in rows) / elapsed_s,
        "data_wait_s": statistics.median(row["train/data_wait_s"] for row in rows),
    }
    if "train/mfu" in rows[-1]:
        found["mfu"] = rows[-1]["train/mfu"] * rows[-1]["train/step_s"] * count / elapsed_s
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of token shards")
    parser.add_argument("--config", default="gpt2-124m", help="a preset or a TOML file (default: gpt2-124m)")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences a pass (default: 8)")
    parser.add_argument("--micro-steps", type=int, default=1, help="passes a step (default: 1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps a way and round (default: 10)")
    parser.add_argument("--ways", nargs="+", metavar="NAME", help="only these, in quotes, as the table names them")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--setup-s", type=float, default=float("inf"), metavar="SECONDS",
                        help="leave out what has not begun to be compiled after this time")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
