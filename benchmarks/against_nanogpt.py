"""Compare training speed with nanoGPT's: the same model, tokens, batch and precision, in turns.

    python benchmarks/against_nanogpt.py --peer DIR --data data/quickstart/shards [--model laptop] [--rounds 3]
        [--json benchmarks/results/against_nanogpt_cpu.json]

On a GPU both compute in bf16 and are compiled; hpcgpt also with train.deterministic, to see its price. On a CPU nanoGPT
runs as its README says, in float32 and not compiled (its dtype has no effect there); hpcgpt runs in float32, in bf16 if
the CPU has it, and compiled, too.

Figures are target tokens per second of wall-clock time, from the end of step --settle to the end of the last step:
without compilation and start-up, but with everything between two steps. "Between" is the fraction of that time outside
of steps. MFU is counted as in nanoGPT, with the GPU's peak in hpcgpt's table.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import side_by_side
from side_by_side import EVERY, MODELS, words

PEER = "nanoGPT"


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="laptop")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default: 60)")
    parser.add_argument("--settle", type=int, default=20, help="steps before the clock starts (default: 20)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences a pass (default: 8)")
    options = parser.parse_args()
    if options.steps % EVERY or options.settle % EVERY or options.settle >= options.steps:
        raise SystemExit(f"--steps and --settle must be multiples of {EVERY}, and --settle the smaller one")
    ways: dict[str, list[str] | None] = {PEER: None}
    if options.device == "cuda":
        ways["ours"] = words("train", dtype="bfloat16", compile="on")
        ways["ours, deterministic"] = [*words("train", deterministic="true"), *(ways["ours"] or ())]
    else:
        ways["ours, float32"] = words("train", dtype="float32")
        ways["ours"] = words("train", dtype="auto")
        ways["ours, compiled"] = words("train", dtype="auto", compile="on")
        if options.model == "readme":  # its steps are short enough for one more
            ways["ours, compiled, deterministic"] = words("train", dtype="auto", compile="on", deterministic="true")
    tokens = options.batch * MODELS[options.model][3]
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = side_by_side.prepared(options.peer, Path(scratch), options.data)
        for number in range(options.rounds):
            for way in random.sample(sorted(ways), len(ways)):
                figures = _run(way, ways[way], number, folder, options, tokens)
                runs[way].append(figures)
                print(
                    f"round {number + 1}  {way:30} " + "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()),
                    flush=True,
                )
    medians = {way: statistics.median(run["tokens_per_s"] for run in found) for way, found in runs.items()}
    for way, speed in medians.items():
        print(f"{way:30} {speed:12,.0f} tokens/s   {speed / medians[PEER]:5.2f} x {PEER}")
    if options.json:
        shape = dict(zip(("n_layer", "n_head", "n_embd", "block_size"), MODELS[options.model], strict=True))
        result: dict[str, Any] = {
            "model": {"name": options.model, **shape},
            "batch": options.batch,
            "micro_batch": options.micro_batch,
            "steps": [options.settle, options.steps],
            "device": options.device,
            "medians": medians,
            "runs": runs,
            "machine": side_by_side.machine(options.peer),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _run(way: str, flags: list[str] | None, number: int, folder: Path, options: Any, tokens: int) -> dict[str, float]:
    counted = options.steps - options.settle
    shape = (options.model, options.steps, options.batch, options.micro_batch)
    if flags is None:
        compiled = options.device == "cuda"
        dtype = "bfloat16" if compiled else "float32"
        lines = side_by_side.run_nanogpt(options.peer, folder, *shape, options.device, compile=compiled, dtype=dtype)
        ends = {step: at for at, line in lines if (step := side_by_side.iteration(line)) is not None}
        # Iteration n is the (n + 1)-th, and they make one more than max_iters.
        return {"tokens_per_s": counted * tokens / (ends[options.steps] - ends[options.settle])}
    name = f"{way.replace(', ', '_')}_{number}"
    rows = side_by_side.run_hpcgpt(folder, name, options.data, *shape, "--run.device", options.device,
                             *words("eval", every=0), *flags)  # fmt: skip
    first, last = rows[options.settle - 1], rows[-1]
    elapsed_s = last["time"] - first["time"]
    steps_s = sum(row["train/step_s"] for row in rows[options.settle :])
    figures = {
        "tokens_per_s": counted * tokens / elapsed_s,
        "between": (elapsed_s - steps_s) / elapsed_s,
        "data_wait_s": statistics.median(row["train/data_wait_s"] for row in rows[options.settle :]),
    }
    if "train/mfu" in last:
        figures["mfu"] = statistics.median(row["train/mfu"] for row in rows[options.settle :])
        figures["memory_bytes"] = last["train/memory_bytes"]
    return figures


if __name__ == "__main__":
    main()
