"""Run folders with made-up records of any number of steps; benchmarks/report.py measures pages of them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

TOKENS_PER_STEP = 524_288
STEP_S = 0.5


def make_run(folder: Path, steps: int) -> None:
    """Write a run folder with made-up records."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "abcdefghij", "created": 1.7e9}))
    per_attempt = max(1000, steps // 50)
    generator, now = random.Random(1), 1.7e9
    events, samples = [], []
    with open(folder / "metrics.jsonl", "w") as metrics:
        for step in range(1, steps + 1):
            attempt = (step - 1) // per_attempt + 1
            if (step - 1) % per_attempt == 0:
                events += _ended(attempt - 1, step - 1, now) + _started(attempt, step - 1, steps, now + 60)
                now += 90
            now += STEP_S
            row = _row(step, attempt, now, generator, steps)
            if step % 250 == 0 or step == steps:
                row |= {"val/loss": row["train/loss"] + 0.02, "val/perplexity": 30.0, "val/bits_per_byte": 1.0,
                        "val/elapsed_s": 2.0}  # fmt: skip
                now += 2.0
                samples.append({"step": step, "time": now, "text": f"Once upon a time, step {step}. " * 20})
                events.append({"time": now, "event": "save", "attempt": attempt, "step": step, "seconds": 3.0,
                               "stall_s": 0.2, "bytes": 1_500_000_000})  # fmt: skip
            metrics.write(json.dumps(row) + "\n")
    events += _ended(attempt, steps, now, 0, "finished")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def _row(step: int, attempt: int, now: float, generator: random.Random, steps: int) -> dict[str, Any]:
    loss = 2.8 + 8.0 / math.sqrt(1 + step / 20) + generator.gauss(0, 0.03)
    if step == steps * 2 // 3:
        loss += 4.0
    return {
        "step": step, "tokens": step * TOKENS_PER_STEP, "samples": step * 512, "time": now, "attempt": attempt,
        "train/loss": loss, "train/lr": 6e-4 * min(1, step / 700), "train/grad_norm": abs(generator.gauss(0.4, 0.1)),
        "train/tokens_per_s": TOKENS_PER_STEP / STEP_S * generator.uniform(0.97, 1.0), "train/step_s": STEP_S,
        "train/data_wait_s": 0.001, "train/memory_bytes": 41_234_567_890, "train/mfu": 0.45,
    }  # fmt: skip


def _started(attempt: int, step: int, steps: int, at: float) -> list[dict[str, Any]]:
    about = {"attempt": attempt, "job": f"7_{attempt - 1}", "step": step}
    return [
        {"time": at, "event": "start", **about, "total_steps": steps, "world_size": 8, "host": "n1",
         "hosts": ["n1", "n2"], "began_at": at - 20},
        {"time": at + 30, "event": "ready", **about, "warm_up_s": 20.0, "load_s": 4.0},
    ]  # fmt: skip


def _ended(attempt: int, step: int, at: float, status: int = 75, reason: str = "") -> list[dict[str, Any]]:
    if not attempt:
        return []
    reason = reason or f"saved at step {step:,}: the time limit is near"
    about = {"attempt": attempt, "job": f"7_{attempt - 1}"}
    found = [{"time": at, "event": "end", **about, "status": status, "reason": reason, "step": step}]
    return [*found, {"time": at + 1, "event": "requeue", "job": about["job"], "reason": reason}] if status else found
