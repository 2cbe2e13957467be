"""The part `stalls`: what saves cost, how long steps wait for data, and what passes between two steps."""

from __future__ import annotations

import json
import shutil
import statistics
from functools import partial
from itertools import pairwise

from part import Figures, Part, flags, rows
from speeds import MICRO_BATCH, configuration, models


def run(part: Part, wanted: list[str] | None, _only: list[str] | None) -> None:
    """Measure both for each model; by default only for the first, whose steps are the shortest."""
    for model in wanted or models(part, wanted)[:1]:
        part.check(f"{model}, save", partial(_save, part, model))
        part.check(f"{model}, run", partial(_run, part, model))


def _save(part: Part, model: str) -> Figures:
    """Run benchmarks/save_stall.py: the same steps without a save, with one, and with one in the background."""
    result = part.scratch / "save_stall.json"
    steps = 60 if part.small else 150
    part.run([
        "benchmarks/save_stall.py", "--config", str(configuration(part, model)), "--device", part.device,
        "--tokens", "64" if part.small else "1024", "--batch", str(1 if part.small else MICRO_BATCH[model]),
        "--steps", str(steps), "--rounds", "2" if part.small else "3", "--dir", str(part.scratch),
        "--json", str(result),
    ])  # fmt: skip
    return json.loads(result.read_text())  # type: ignore[no-any-return]


def _run(part: Part, model: str) -> Figures:
    """Train, with saves in the background; compare the time of steps with the time from one row to the next."""
    name, micro = f"stalls_{model}", MICRO_BATCH[model]
    folder = part.scratch / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    steps = 12 if part.small else 150
    values = {
        "run.name": name, "run.dir": folder.parent, "run.device": part.device, "train.steps": steps,
        "train.global_batch": 2 * micro, "train.micro_batch": micro, "schedule.warmup_steps": 3,
        "checkpoint.every": steps // 3, "checkpoint.keep_last": 1, "eval.every": 0, "sample.tokens": 0,
    }  # fmt: skip
    part.run(["-m", "hpcgpt.train", str(configuration(part, model)), *flags(values)])
    found = rows(folder)
    between = [later["time"] - earlier["time"] - later["train/step_s"] for earlier, later in pairwise(found)]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {
        "step_s": _spread([row["train/step_s"] for row in found[5:]]),
        "between_s": _spread(between[4:]),
        "data_wait_s": _spread([row["train/data_wait_s"] for row in found[5:]]),
        "mfu": found[-1].get("train/mfu"),
        "saves": [event for event in events if event["event"] == "save"],
        "ready": next(event for event in events if event["event"] == "ready"),
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "p95": ordered[int(0.95 * len(ordered))], "max": ordered[-1]}
