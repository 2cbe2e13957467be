"""The parts `peer` and `ablations`: tokens/s and MFU, beside nanoGPT and with single options changed.

Both start the benchmarks that are there for that; what runs in turns is decided there. Here are only the sizes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from functools import partial
from pathlib import Path

from part import ENOUGH_S, TAIL, FaultError, Figures, Part, TimeOverError, end, last_json

# Sequences a pass: what fits into 80 GB.
MICRO_BATCH = {"readme": 8, "124m": 32, "350m": 16, "774m": 8}
MODELS = ("124m", "350m", "774m")
# All ways of a size are in memory at the same time, so of the largest only these.
FASTEST = "bf16, compiled"
FEWER = {"774m": [FASTEST, *(f"{FASTEST}, {way}" for way in ("deterministic", "activation checkpointing", "cudnn"))]}
ROUNDS = 3


def models(part: Part, wanted: list[str] | None) -> list[str]:
    return wanted or (["readme"] if part.small else list(MODELS))


def beside_peer(part: Part, wanted: list[str] | None, _only: list[str] | None) -> None:
    """Run nanoGPT and hpcgpt, with and without train.deterministic: a round of each model after the other."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(ROUNDS):
        for model in models(part, wanted):
            runs: dict[str, list[float]] = found.setdefault(model, {})
            part.check(f"{model}, round {number + 1}", partial(_round, part, model, runs))
            if runs:
                medians = {way: statistics.median(speeds) for way, speeds in runs.items()}
                part.note(f"{model}, so far", True, {"tokens_per_s": medians, "runs": runs})


def _round(part: Part, model: str, runs: dict[str, list[float]]) -> Figures:
    """Run each way once, in an order of chance; add its tokens/s to `runs`."""
    assert part.peer
    micro, result = MICRO_BATCH[model], part.scratch / "round.json"
    steps = ["--steps", "20", "--settle", "10"] if part.small else ["--steps", "40", "--settle", "20"]
    part.run([
        "benchmarks/against_nanogpt.py", "--peer", str(part.peer), "--data", str(part.data), "--model", model,
        "--rounds", "1", "--batch", str(2 * micro), "--micro-batch", str(micro), "--device", part.device,
        "--json", str(result), *steps,
    ])  # fmt: skip
    found: Figures = json.loads(result.read_text())
    for way, (run,) in found["runs"].items():
        runs.setdefault(way, []).append(run["tokens_per_s"])
    return {"runs": found["runs"], "batch": found["batch"], "micro_batch": micro}


def ablations(part: Part, wanted: list[str] | None, _only: list[str] | None) -> None:
    """Measure each way of computing a step, in one process for each model."""
    for model in models(part, wanted):
        part.check(model, partial(_ablation, part, model))


def _ablation(part: Part, model: str) -> Figures:
    """Run benchmarks/step.py, which writes its figures after each round; half of the time is for compiling."""
    config, result = configuration(part, model), part.scratch / f"step_{model}.json"
    result.unlink(missing_ok=True)
    limit_s = part.left_s
    words = [
        "benchmarks/step.py", "--data", str(part.data), "--config", str(config), "--micro-steps", "2",
        "--micro-batch", str(MICRO_BATCH[model]), "--rounds", "5", "--steps", "2" if part.small else "10",
        "--device", part.device, "--setup-s", str(limit_s / 2), "--json", str(result),
    ]  # fmt: skip
    words += ["--ways", *FEWER[model]] if model in FEWER else []
    with part.started(words) as running:
        try:
            printed, _ = running.communicate(timeout=max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            end(running)
            printed, _ = running.communicate()
    if not result.exists():
        raise (TimeOverError if part.left_s < ENOUGH_S else FaultError)(printed[-TAIL:])
    return json.loads(result.read_text()) | {"complete": running.returncode == 0}  # type: ignore[no-any-return]


def configuration(part: Part, model: str) -> Path:
    """Write the configuration of one of the sizes that the comparison with nanoGPT has."""
    words = ["-c", "import sys; sys.path.insert(0, 'benchmarks'); import json, side_by_side; "
             "print(json.dumps(side_by_side.MODELS))"]  # fmt: skip
    layers, heads, width, length = last_json(part.run(words))[model]
    path = part.scratch / f"{model}.toml"
    path.write_text(f"""\
[run]
threads = {1 if part.small else 0}
[data]
dir = "{part.data}"
[model]
n_layer = {layers}
n_head = {heads}
n_embd = {width}
block_size = {length}
[tracking]
wandb = "disabled"
""")
    return path
