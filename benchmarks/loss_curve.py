"""Compare loss curves with nanoGPT's: the same tokens, model and schedule.

    python benchmarks/loss_curve.py --peer DIR --data data/quickstart/shards [--seeds 3] [--steps 500]
        [--json benchmarks/results/loss_curve.json]

Each seed of each program is a run. Each program computes its own validation loss, at the same steps: nanoGPT over
--windows random windows, hpcgpt over as many that are spread evenly. The means over the seeds are compared, with their
scatter; and the loss that each has reached when the faster one has finished. nanoGPT's seed is fixed in its source
(1337 plus its rank); for other seeds that number is replaced in a copy of train.py in the scratch folder.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import side_by_side
from side_by_side import MODELS, words

RATE, LOW, WARMUP = 1e-3, 1e-4, 100
Curve = dict[int, tuple[float, float]]  # step -> seconds since the first step, validation loss


def main() -> None:
    parser = side_by_side.parser(__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="laptop")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=100, help="steps between two evaluations (default: 100)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--windows", type=int, default=160, help="validation windows (default: 160)")
    options = parser.parse_args()
    found: dict[str, list[Curve]] = {"nanoGPT": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = side_by_side.prepared(options.peer, Path(scratch), options.data)
        for seed in range(1, options.seeds + 1):
            found["nanoGPT"].append(_nanogpt_curve(options, folder, seed))
            found["ours"].append(_hpcgpt_curve(options, folder, seed))
    _report(found, options)


def _nanogpt_curve(options: Any, folder: Path, seed: int) -> Curve:
    copy = folder / f"seed_{seed}"
    copy.mkdir()
    source = (options.peer / "train.py").read_text()
    changed = source.replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    if changed == source:
        raise SystemExit(f"{options.peer / 'train.py'} sets its seed in another way than expected")
    (copy / "train.py").write_text(changed)
    for name in ("model.py", "configurator.py"):
        (copy / name).symlink_to((options.peer / name).resolve())
    gpu = options.device == "cuda"
    values = {
        "learning_rate": RATE, "min_lr": LOW, "warmup_iters": WARMUP, "lr_decay_iters": options.steps,
        "eval_interval": options.every, "eval_iters": options.windows // options.batch, "compile": gpu,
        "dtype": "bfloat16" if gpu else "float32",
    }  # fmt: skip
    lines = side_by_side.run_nanogpt(copy, folder, options.model, options.steps, options.batch, options.batch,
                                options.device, **values)  # fmt: skip
    curve: Curve = {}
    began_at, evaluating_s, last_at = 0.0, 0.0, 0.0
    for at, line in lines:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
            began_at = began_at or at
            evaluating_s += at - last_at if last_at else 0.0  # approximately: since the last line of an iteration
            curve[int(found[1])] = (at - began_at - evaluating_s, float(found[2]))
        last_at = at
    return curve


def _hpcgpt_curve(options: Any, folder: Path, seed: int) -> Curve:
    rows = side_by_side.run_hpcgpt(
        folder, f"ours_{seed}", options.data, options.model, options.steps, options.batch, options.batch,
        "--run.device", options.device, "--run.seed", str(seed),
        *words("optim", lr=RATE), *words("schedule", warmup_steps=WARMUP, min_lr=LOW),
        *words("eval", every=options.every, batches=options.windows // options.batch),
    )  # fmt: skip
    elapsed_s, curve = 0.0, {}
    for row in rows:
        elapsed_s += row["train/step_s"]
        if "val/loss" in row:
            curve[row["step"]] = (elapsed_s, row["val/loss"])
    return curve


def _report(found: dict[str, list[Curve]], options: Any) -> None:
    table: dict[str, Any] = {}
    for way, curves in found.items():
        steps = sorted(set.intersection(*(set(curve) for curve in curves)) - {0})
        table[way] = {
            str(step): {
                "loss": statistics.mean(curve[step][1] for curve in curves),
                "scatter": statistics.stdev(curve[step][1] for curve in curves) if len(curves) > 1 else None,
                "seconds": statistics.median(curve[step][0] for curve in curves),
            }
            for step in steps
        }
        for step, row in table[way].items():
            print(
                f"{way:8} step {step:>6}  loss {row['loss']:.4f} +- {row['scatter'] or 0:.4f}  {row['seconds']:8.1f} s"
            )
    if options.json:
        result = {
            "model": options.model, "batch": options.batch, "steps": options.steps, "seeds": options.seeds,
            "device": options.device, "curves": table, "machine": side_by_side.machine(options.peer),
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
