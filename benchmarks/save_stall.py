"""Measure what a checkpoint costs the training loop, saved in the background or synchronously.

    python benchmarks/save_stall.py [--config gpt2-124m] [--tokens 256] [--steps 6] [--rounds 3] [--dir .]
        [--device cpu] [--batch 1]

Each round runs the same number of optimizer steps three times, in a new order: without a save, with a synchronous save
after the first step, and with a background save. The cost is the median time with a save less the median without: it
includes the copy, and how much the writing slows the steps. Prints a table, and JSON with --json FILE. The checkpoints
are real ones, flushed to the disk of --dir, in a folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import Saver, local_state_dict
from hpcgpt.config import sources
from hpcgpt.config.options import Checkpoint, Parallel
from hpcgpt.distributed import world
from hpcgpt.model.gpt import GPT
from hpcgpt.model.precision import computing_in
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.storage import lease
from hpcgpt.training.parallel import parallelize
from hpcgpt.training.step import train_step


def main() -> None:
    options = _parser().parse_args()
    device = torch.device(options.device)
    alone = world.Ranks(world.World(0, 0, 1, 1, "alone", "benchmark"), device, None)
    settings = sources.from_file(sources.find(options.config))
    shape = replace(settings.model, vocab_size=50257, block_size=max(settings.model.block_size, options.tokens))
    gpt = GPT(shape, 1)
    model = parallelize(gpt, alone, Parallel(), seed=1, compiled=False, dtype=torch.float32)
    optimizer = make_optimizer(gpt, settings.optim)
    ids = torch.randint(0, shape.vocab_size, (options.batch, options.tokens))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    def step() -> None:
        train_step(
            model, optimizer, [torch.cat((ids, ids[:, :1]), dim=1)], micro_steps=1, rate=1e-4, clip_norm=1.0,
            precision=lambda: computing_in(dtype, device), ranks=alone,
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    times: dict[str, list[float]] = {"no save": [], "synchronous": [], "background": []}
    stalls: dict[str, list[float]] = {"synchronous": [], "background": []}
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        run = Path(folder)
        (run / "checkpoints").mkdir()
        own = lease.acquire(run, "")
        saver = Saver(run / "checkpoints", alone, own, Checkpoint(keep_last=1))
        number = 0
        for _ in range(options.rounds):
            for way in random.sample(sorted(times), 3):
                started_at = time.perf_counter()
                number += 1
                for at in range(options.steps):
                    step()
                    if at == 0 and way != "no save":
                        saver.begin(State(number, 0, 0, 1, {}), local_state_dict(gpt, optimizer, alone))
                        if way == "synchronous" and (saved := saver.finish(lambda: None)):
                            stalls[way].append(saved.stall_s)
                    elif saver.busy and (saved := saver.poll()):
                        stalls[way].append(saved.stall_s)
                times[way].append(time.perf_counter() - started_at)
                if saver.busy:
                    raise SystemExit(f"{options.steps} steps are over before the save is: take more --steps")
        own.release()
    _report(options, times, stalls, sum(t.nbytes for t in local_state_dict(gpt, optimizer, alone).values()))


def _report(
    options: argparse.Namespace, times: dict[str, list[float]], stalls: dict[str, list[float]], size: int
) -> None:
    medians = {way: statistics.median(found) for way, found in times.items()}
    step_s = medians["no save"] / options.steps
    result: dict[str, Any] = {
        "config": options.config,
        "tokens_per_step": options.tokens * options.batch,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "checkpoint_bytes": size,
        "step_s": step_s,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "ways": {},
    }
    print(
        f"{options.config}: {step_s:.2f} s a step of {options.tokens * options.batch} tokens, "
        f"a checkpoint has {size / 1e6:,.0f} MB"
    )
    for way, found in stalls.items():
        cost, stall = medians[way] - medians["no save"], statistics.median(found)
        result["ways"][way] = {"cost_s": cost, "stall_s": stall, "totals_s": times[way]}
        print(f"{way:16}  stalls for {stall:6.2f} s   costs {cost:6.2f} s in all   {cost / step_s:5.2f} steps")
    result["ways"]["no save"] = {"totals_s": times["no save"]}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="gpt2-124m")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=6, help="steps a way and round (default: 6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default=".", help="a folder on the disk to measure (default: this one)")
    parser.add_argument("--json", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
