"""The part `memory`: the peak that `hpcgpt estimate` plans, and the one that a run has.

On a GPU measured is what torch's allocator had given out at most, and had reserved; on a CPU the largest resident set.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from typing import Any

from part import Figures, Part, flags, last_json
from speeds import MICRO_BATCH, configuration, models

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"train.compile": "off"},
    "compiled": {"train.compile": "on"},
    "activation checkpointing": {"train.compile": "off", "train.activation_checkpointing": "true"},
    "loss chunks": {"train.compile": "off", "train.loss_chunk": 4096},
    "loss chunks, compiled": {"train.compile": "on", "train.loss_chunk": 4096},
    "half the batch": {"train.compile": "off", "halved": True},
    "deterministic": {"train.compile": "off", "train.deterministic": "true"},
}


def run(part: Part, wanted: list[str] | None, _only: list[str] | None) -> None:
    """Measure each way of each model."""
    for model in models(part, wanted):
        for way in WAYS:
            if not (part.small and way.startswith("loss chunks")):  # a batch of few tokens has no chunks
                part.check(f"{model}, {way}", partial(_compared, part, model, way))


def _compared(part: Part, model: str, way: str) -> Figures:
    """Estimate a run, and make it: a few steps, during which it saves, and an evaluation."""
    changes = dict(WAYS[way])
    micro = MICRO_BATCH[model] // (2 if changes.pop("halved", False) else 1)
    name, result = f"memory_{model}", part.scratch / "peak.json"
    shutil.rmtree(part.scratch / "runs" / name, ignore_errors=True)
    result.unlink(missing_ok=True)
    values = {
        "run.name": name, "run.dir": part.scratch / "runs", "run.device": part.device, "train.steps": 6,
        "train.global_batch": 2 * micro, "train.micro_batch": micro, "schedule.warmup_steps": 3,
        "checkpoint.every": 3, "eval.every": 6, "eval.batches": 2, "sample.tokens": 0,
    }  # fmt: skip
    words = [str(configuration(part, model)), *flags(values | changes)]
    device = "cpu" if part.device == "cpu" else "h100-80"
    printed = part.run(["-m", "hpcgpt.estimate", "--json", "--ranks", "1", "--gpu", device, "--rate", "1", *words])
    planned: Figures = last_json(printed)["memory"]
    part.run(["benchmarks/gpu/train_measured.py", *words], {"MEASURED_TO": str(result)})
    measured: Figures = json.loads(result.read_text())
    peak = measured["allocated" if part.device == "cuda" else "resident"]
    return {
        "planned": planned["peak_bytes"], "measured": measured, "error": planned["peak_bytes"] / peak - 1,
        "micro_batch": micro, "plan": planned,
    }  # fmt: skip
