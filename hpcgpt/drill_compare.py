"""Did two runs end with the same bytes? The judge of the drill.

Compared are every tensor of the last checkpoint (weights, optimizer state, each rank's random generators),
what its state.json says, and every row of metrics.jsonl but for the figures that are about time. Beside that, each
step must have one row, all attempts one wandb id, and no checkpoint may be of an older generation than one before it.

No torch in here: files are compared, not models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hpcgpt import runfolder

# What must not depend on interruptions; the other figures of a row tell of time.
ROW_KEYS = (
    "step", "tokens", "samples", "train/loss", "train/lr", "train/grad_norm", "val/loss", "val/perplexity",
    "val/bits_per_byte",
)  # fmt: skip
STATE_KEYS = ("step", "tokens", "samples", "world_size", "identity", "pending")

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    """Everything in which the run in `folder` differs from the one that was left alone; [] if nothing does."""
    return [
        *row_differences(folder, baseline, steps),
        *tensor_differences(folder, baseline, steps),
        *generation_disorder(folder),
    ]


def row_differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    found = runfolder.read_rows(folder / "metrics.jsonl")
    problems = []
    if [row["step"] for row in found] != list(range(1, steps + 1)):
        seen = [row["step"] for row in found]
        wrong = next((i for i, step in enumerate(seen) if step != i + 1), len(seen))
        problems.append(
            f"metrics.jsonl: expected steps 1 to {steps:,}, each once; found {len(seen):,} rows, the first wrong one "
            f"is row {wrong + 1} ({f'step {seen[wrong]}' if wrong < len(seen) else 'missing'})"
        )
    expected = {row["step"]: row for row in runfolder.read_rows(baseline / "metrics.jsonl")}
    for row in found:
        other = expected.get(row["step"], {})
        wrong_keys = [key for key in ROW_KEYS if row.get(key) != other.get(key)]
        if wrong_keys:
            key = wrong_keys[0]
            problems.append(
                f"metrics.jsonl: step {row['step']:,} has {key} {row.get(key)!r}, and alone it was {other.get(key)!r}"
            )
            break  # all that follow differ, too
    return problems


def tensor_differences(folder: Path, baseline: Path, steps: int) -> list[str]:
    name = f"step_{steps:09d}"
    mine, theirs = folder / "checkpoints" / name, baseline / "checkpoints" / name
    if not (mine / "manifest.json").is_file():
        return [f"there is no checkpoint {name}"]
    found, expected = tensors(mine), tensors(theirs)
    problems = []
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        problems.append(f"{name}: {len(odd)} tensors are in one of the two only: {', '.join(odd[:3])}")
    wrong = sorted(key for key in found.keys() & expected.keys() if found[key] != expected[key])
    if wrong:
        problems.append(f"{name}: {len(wrong)} of {len(found)} tensors differ: {', '.join(wrong[:3])}")
    states = [json.loads((path / "state.json").read_bytes()) for path in (mine, theirs)]
    problems += [
        f"{name}: state.json says {key} {states[0].get(key)!r}, and alone it was {states[1].get(key)!r}"
        for key in STATE_KEYS
        if states[0].get(key) != states[1].get(key)
    ]
    return problems


def tensors(checkpoint: Path) -> Tensors:
    """Every tensor of a checkpoint as dtype, shape and bytes, whichever rank wrote it."""
    from safetensors import deserialize

    found: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            found[name] = (str(tensor["dtype"]), tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def generation_disorder(folder: Path) -> list[str]:
    """One writer: of two checkpoints the later one is never of an older generation."""
    newest, problems = 0, []
    for path in sorted((folder / "checkpoints").glob("step_*")):
        generation = int(json.loads((path / "manifest.json").read_bytes())["generation"])
        if generation < newest:
            problems.append(f"{path.name} is of generation {generation}, and one before it of generation {newest}")
        newest = max(newest, generation)
    return problems


def wandb_parts(folder: Path, steps: int) -> tuple[list[str], str]:
    """Problems, and a sentence about what the attempts left for wandb.

    Only a second id is a problem. Rows may be missing: SIGKILL and a full disk take some from wandb, and
    metrics.jsonl is the truth.
    """
    run_id = runfolder.run_id(folder)
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    ids, seen = {path.stem.removeprefix("run-") for path in parts}, set()
    for part in parts:
        for record in _records(part):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
            elif record["type"] == "history":
                seen.add(record["history"]["item"].get("step"))
    missing = steps - len(seen & set(range(1, steps + 1)))
    said = f"{len(parts)} parts, {len(ids)} id, {missing} of {steps:,} rows missing"
    return ([] if ids == {run_id} else [f"wandb's ids are {sorted(ids)}, and the run's is {run_id}"]), said


def _records(part: Path) -> list[dict[str, Any]]:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = []
    for line in done.stdout.splitlines():  # the last one of a part that was cut short may be torn
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
