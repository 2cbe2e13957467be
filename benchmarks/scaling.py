"""Compare several ranks with one: throughput, and the fraction of a step that communication takes.

    python benchmarks/scaling.py --data data/quickstart/shards [--config gpt2-124m] [--ranks 1,2] [--modes ddp,fsdp]
        [--micro-batch 4] [--micro-steps 2] [--rounds 5] [--steps 4] [--threads 1] [--device cpu] [--compile]
        [--dtype auto] [--gradient-dtype float32] [--json benchmarks/results/scaling.json]

On a node of 8 GPUs: --device cuda --ranks 1,2,4,8 --micro-batch 32 --micro-steps 4 --steps 20 --compile. Every rank
has the same work and the same number of threads, however many ranks there are. Compared are:

    1 rank         alone
    W apart        W processes that train independently at the same time: they share memory, caches and power
    W ranks, MODE  W ranks together. Compiled, the mode ddp splits its graph at DDP's buckets, so that they are sent
                   while it still computes (torch's optimize_ddp); the mode ddp:whole does not split it

Efficiency is tokens/s over W times those of one rank. Communication is the fraction of a step by which it is longer
than apart: what does not overlap with computation. All processes start at the beginning, with engines as in `hpcgpt
train`; in each round each makes --steps steps, in a new order, while the others wait. Medians over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.config.options import Config, Parallel
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model import host_memory
from hpcgpt.training.engine import Engine


class Way:
    """Several processes that train on demand, together in a mode or independently."""

    def __init__(self, ranks: int, mode: str, folder: Path) -> None:
        self.ranks, self.mode, self.seconds = ranks, mode, list[float]()
        folder.mkdir(exist_ok=True)
        run_id = secrets.token_hex(4)
        self._processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            env = os.environ | place | {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": run_id}
            words = [sys.executable, __file__, *sys.argv[1:], "--worker", mode, "--folder", str(folder)]
            self._processes.append(
                subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

    @property
    def name(self) -> str:
        if self.mode == "apart":
            return f"{self.ranks} apart" if self.ranks > 1 else "1 rank"
        return f"{self.ranks} ranks, {self.mode}"

    def answers(self) -> list[float]:
        """Read a number from each process; exit if one of them has ended."""
        found = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{self.name}: a process ended with status {process.wait()}")
            found.append(float(line))
        return found

    def go(self, steps: int) -> None:
        for process in self._processes:
            print(steps, file=process.stdin, flush=True)
        self.seconds.append(max(self.answers()) / steps)

    def end(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def main() -> None:
    options = _parser().parse_args()
    if options.worker:
        _work(options)
        return
    counts = [int(count) for count in options.ranks.split(",")]
    ways: list[Way] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for count in sorted({1, *counts}):
                for mode in ["apart", *(options.modes.split(",") if count > 1 else [])]:
                    ways.append(Way(count, mode, Path(folder) / str(len(ways))))
                    ways[-1].answers()
                    print(f"ready: {ways[-1].name}", flush=True)
            for _ in range(options.rounds):
                for way in random.sample(ways, len(ways)):
                    way.go(options.steps)
        finally:
            for way in ways:
                way.end()
    _report(options, ways)


def _report(options: argparse.Namespace, ways: list[Way]) -> None:
    settings = plan.make(_config(options, 1, "ddp"), 1).config
    tokens = options.micro_batch * options.micro_steps * settings.model.block_size
    step_s = {(way.ranks, way.mode): statistics.median(way.seconds) for way in ways}
    found: dict[str, dict[str, float]] = {}
    for way in ways:
        seconds = step_s[way.ranks, way.mode]
        figures = {"step_s": seconds, "tokens_per_s": way.ranks * tokens / seconds}
        figures["efficiency"] = step_s[1, "apart"] / seconds
        figures["spread"] = (max(way.seconds) - min(way.seconds)) / seconds
        if way.mode != "apart":
            figures["communication"] = 1 - step_s[way.ranks, "apart"] / seconds
        found[way.name] = figures
        print(f"{way.name:20} " + "  ".join(f"{key} {value:,.4g}" for key, value in figures.items()), flush=True)
    if options.json:
        unsaid = ("json", "worker", "folder", "data", "config")
        about = {
            "model": dataclasses.asdict(settings.model),
            **{key: value for key, value in vars(options).items() if key not in unsaid},
            "machine": machine.about(),
        }
        options.json.write_text(json.dumps(about | {"ways": found}, indent=1) + "\n")


# --- one rank --------------------------------------------------------------------------------------


def _work(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    here = world.discover()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(device)
    else:
        host_memory.keep_freed()
    if options.worker == "apart":
        ranks, mode = Ranks(world.World(0, 0, 1, 1, "alone", "benchmark"), device, None), "ddp"
    else:
        ranks = rendezvous.connect(here, device, options.folder, "auto", 120.0)
        mode, _, graph = options.worker.partition(":")
        if graph == "whole":
            torch._dynamo.config.optimize_ddp = False
    engine = Engine(plan.make(_config(options, ranks.world.size, mode), ranks.world.size), ranks)
    engine.warm_up()
    step = _steps(engine, 0, 2, device)[0]
    print(0.0, flush=True)
    for line in sys.stdin:
        step, elapsed_s = _steps(engine, step, int(line), device)
        print(elapsed_s, flush=True)
    sys.stdout.flush()
    os._exit(0)


def _steps(engine: Engine, step: int, count: int, device: torch.device) -> tuple[int, float]:
    """Run `count` steps as the training loop does; return the number of the next step, and the seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started_at = time.perf_counter()
    unread = None
    for number in range(step, step + count):
        pending_step = engine.launch(number, number)
        if unread is not None:
            engine.read(unread)
        unread = pending_step
    if unread is not None:
        engine.read(unread)
    return step + count, time.perf_counter() - started_at


def _config(options: argparse.Namespace, ranks: int, mode: Any) -> Config:
    settings = sources.from_file(sources.find(options.config))
    train = dataclasses.replace(
        settings.train,
        micro_batch=options.micro_batch,
        global_batch=options.micro_batch * options.micro_steps * ranks,
        dtype=options.dtype,
        compile="on" if options.compile else "off",
    )
    parallel = Parallel(mode, options.gradient_dtype if ranks > 1 else "float32")
    data = dataclasses.replace(settings.data, dir=str(options.data), mix=())
    return dataclasses.replace(settings, train=train, data=data, parallel=parallel)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of token shards")
    parser.add_argument("--config", default="gpt2-124m", help="a preset or a TOML file (default: gpt2-124m)")
    parser.add_argument("--ranks", default="1,2", help="numbers of ranks, with commas between (default: 1,2)")
    parser.add_argument(
        "--modes", default="ddp,zero1,fsdp", help="values of parallel.mode, and ddp:whole (default: all but that)"
    )
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a pass (default: 4)")
    parser.add_argument("--micro-steps", type=int, default=2, help="passes a step and rank (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps a way and round (default: 4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--gradient-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
