"""The configuration of a run of seconds, and readers of what a run has written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Two layers, 12 steps: long enough to be interrupted twice, short enough for one second.
TINY = """
[run]
threads = 1
device = "cpu"

[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32

[schedule]
warmup_steps = 3

[train]
steps = 12
global_batch = 8
micro_batch = 4

[checkpoint]
every = 4

[eval]
every = 6
batches = 8

[sample]
tokens = 5

[tracking]
wandb = "disabled"
"""


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return every tensor of a checkpoint as bytes, whichever rank wrote it."""
    from safetensors import safe_open

    found: dict[str, bytes] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """Return the values of every row of metrics.jsonl that must not depend on interruptions."""
    keys: Sequence[str] = ("step", "tokens", "samples", "train/loss", "train/lr", "train/grad_norm", "val/loss",
                           "val/perplexity", "val/bits_per_byte")  # fmt: skip
    return [tuple(row.get(key) for key in keys) for row in rows(folder / "metrics.jsonl")]
