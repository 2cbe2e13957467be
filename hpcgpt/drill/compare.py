"""The comparison of a run with the undisturbed one: do both end with the same bytes?

Compared are every tensor of the last checkpoint (weights, optimizer state, each rank's random generators), its
state.json, and every row of metrics.jsonl except for times. Besides, each step must have exactly one row, no checkpoint
may be of an older attempt than an earlier one, and the W&B server must have each row of metrics.jsonl once, under one
id.

No torch in here: files are compared, not models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.run import run_folder

# The keys that must not depend on interruptions; the others of a row are times.
ROW_KEYS = (
    "step", "tokens", "samples", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity",
    "val/bits_per_byte",
)  # fmt: skip
STATE_KEYS = ("step", "tokens", "samples", "world_size", "identity", "pending")

SYNC_S = 300.0
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    """List everything in which the run in `folder` differs from the undisturbed one."""
    return [
        *row_differences(folder, baseline, steps),
        *tensor_differences(folder, baseline, steps),
        *attempt_disorder(folder),
    ]


def row_differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    found = run_folder.read_rows(folder / "metrics.jsonl")
    problems = []
    if [row["step"] for row in found] != list(range(1, steps + 1)):
        seen = [row["step"] for row in found]
        wrong = next((i for i, step in enumerate(seen) if step != i + 1), len(seen))
        problems.append(
            f"metrics.jsonl: expected steps 1 to {steps:,}, each once; found {len(seen):,} rows, the first wrong one "
            f"is row {wrong + 1} ({f'step {seen[wrong]}' if wrong < len(seen) else 'missing'})"
        )
    expected = {row["step"]: row for row in run_folder.read_rows(baseline / "metrics.jsonl")}
    for row in found:
        other = expected.get(row["step"], {})
        wrong_keys = [key for key in ROW_KEYS if row.get(key) != other.get(key)]
        if wrong_keys:
            key = wrong_keys[0]
            problems.append(
                f"metrics.jsonl: step {row['step']:,} has {key} {row.get(key)!r}, undisturbed it was {other.get(key)!r}"
            )
            break  # later rows differ, too
    return problems


def tensor_differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    name = f"step_{steps:09d}"
    checkpoint, undisturbed = folder / "checkpoints" / name, baseline / "checkpoints" / name
    if not (checkpoint / "manifest.json").is_file():
        return [f"there is no checkpoint {name}"]
    found, expected = tensors(checkpoint), tensors(undisturbed)
    problems = []
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        problems.append(f"{name}: {len(odd)} tensors are in only one of the two: {', '.join(odd[:3])}")
    wrong = sorted(key for key in found.keys() & expected.keys() if found[key] != expected[key])
    if wrong:
        problems.append(f"{name}: {len(wrong)} of {len(found)} tensors differ: {', '.join(wrong[:3])}")
    states = [json.loads((path / "state.json").read_bytes()) for path in (checkpoint, undisturbed)]
    problems += [
        f"{name}: state.json says {key} {states[0].get(key)!r}, undisturbed it was {states[1].get(key)!r}"
        for key in STATE_KEYS
        if states[0].get(key) != states[1].get(key)
    ]
    return problems


def tensors(checkpoint: Path) -> Tensors:
    """Read every tensor of a checkpoint as dtype, shape and bytes, whichever rank wrote it."""
    from safetensors import deserialize

    found: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            found[name] = (str(tensor["dtype"]), tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def attempt_disorder(folder: Path) -> list[str]:
    """List checkpoints that an older attempt wrote than the checkpoint before: there must be one writer at a time."""
    newest, problems = 0, []
    for path in sorted((folder / "checkpoints").glob("step_*")):
        generation = int(json.loads((path / "manifest.json").read_bytes())["generation"])
        if generation < newest:
            problems.append(f"{path.name} is of attempt {generation}, and one before it of attempt {newest}")
        newest = max(newest, generation)
    return problems


def wandb_differences(folder: Path, server: WandbServer, steps: int) -> tuple[list[str], str]:
    """Complete the run's rows on the server with `hpcgpt.tracking sync`, and compare them with metrics.jsonl.

    Returns the problems, and a message for the report: how many rows the server had before, and what is wrong after.
    """
    run_id = run_folder.run_id(folder)
    before = len(set(server.steps(run_id)))
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")} | server.environ()
    command = [sys.executable, "-m", "hpcgpt.tracking", "sync", str(folder)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SYNC_S, check=False)
    except subprocess.TimeoutExpired:
        problems = [f"wandb: sync did not end within {SYNC_S:.0f} s"]
    else:
        problems = (
            [f"wandb: sync exited with status {done.returncode}: {done.stderr[-500:]}"] if done.returncode else []
        )
    ids = sorted(found for found, name in server.names.items() if name == folder.name)
    if ids != [run_id]:
        problems.append(f"wandb: the run's id is {run_id}, and the server has {ids} under its name")
    found, counts = wandb_row_differences(folder, server.history.get(run_id, []), steps)
    return problems + found, f"{before:,} of {steps:,} rows at the end, {counts} after sync"


def wandb_row_differences(folder: Path, sent: list[dict[str, Any]], steps: int) -> tuple[list[str], str]:
    """Compare the rows that a server received with metrics.jsonl. Returns the problems, and their counts."""
    lines = [line for line in sent if "train/loss" in line]
    counts, due = Counter(line["step"] for line in lines), range(1, steps + 1)
    wrong_steps = {
        "missing": [step for step in due if not counts[step]],
        "doubled": sorted(step for step, count in counts.items() if count > 1),
        "of steps that are not the run's": sorted(step for step in counts if step not in due),
    }
    problems = [
        f"wandb: {len(wrong):,} rows {what}, the first one of step {wrong[0]:,}"
        for what, wrong in wrong_steps.items()
        if wrong
    ]
    expected = {row["step"]: row for row in run_folder.read_rows(folder / "metrics.jsonl")}
    for line in lines:
        row = expected.get(line["step"], line)
        if wrong_keys := [key for key in ROW_KEYS if row.get(key) != line.get(key)]:
            key = wrong_keys[0]
            problems.append(
                f"wandb: step {line['step']:,} has {key} {line.get(key)!r}, and in metrics.jsonl it is {row.get(key)!r}"
            )
            break
    return problems, f"{len(wrong_steps['missing'])} missing, {len(wrong_steps['doubled'])} doubled"
