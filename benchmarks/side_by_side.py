"""Run hpcgpt and the user's checkout of nanoGPT on the same tokens, for both benchmarks that compare them.

Each run is a process in a folder of its own. nanoGPT opens configurator.py and its data below the current folder, so
its folder has a link to the former, and the shards of --data as nanoGPT's headerless files, made by `data_prep.export`.
None of nanoGPT's code is imported or copied.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import about

from data_prep import export
from hpcgpt.data import shard_format
from hpcgpt.model.gpt import VOCAB_MULTIPLE

# layers, heads, width, context
MODELS = {
    "readme": (4, 4, 128, 64),  # that of the run on a CPU in nanoGPT's README
    "laptop": (6, 6, 384, 256),
    "124m": (12, 12, 768, 1024),
    "350m": (24, 16, 1024, 1024),
    "774m": (36, 20, 1280, 1024),
    "1558m": (48, 25, 1600, 1024),
}
EVERY = 10  # steps between two lines of nanoGPT's: a line waits for the GPU


def words(section: str, /, **values: Any) -> list[str]:
    """Format `values` as flags: ``--section.key value``, or nanoGPT's ``--key=value`` if `section` is empty."""
    if not section:
        return [f"--{key}={value}" for key, value in values.items()]
    return [word for key, value in values.items() for word in (f"--{section}.{key}", str(value))]


def run_hpcgpt(
    folder: Path, name: str, data: Path, model: str, steps: int, batch: int, micro: int, *more: str
) -> list[dict[str, Any]]:
    """Run hpcgpt for `steps` steps; return its rows of metrics.jsonl."""
    layers, heads, width, context = MODELS[model]
    command = [
        sys.executable, "-m", "hpcgpt.train",
        *words("run", name=name, dir=folder),
        *words("data", dir=data),
        *words("model", n_layer=layers, n_head=heads, n_embd=width, block_size=context),
        *words("train", steps=steps, global_batch=batch, micro_batch=micro),
        *words("checkpoint", every=0), *words("sample", tokens=0), *words("tracking", wandb="disabled"),
        *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def prepared(peer: Path, folder: Path, data: Path) -> Path:
    """Make a folder in which nanoGPT's train.py runs, with the tokens of the shards in `data`."""
    if not (peer / "train.py").is_file() or not (peer / "configurator.py").is_file():
        raise SystemExit(f"{peer} is no checkout of nanoGPT: train.py and configurator.py are not there")
    tokens = folder / "data" / "tokens"
    export.main([str(data), "--out", str(tokens), "--to", "nanogpt"])
    (folder / "configurator.py").symlink_to((peer / "configurator.py").resolve())
    size = int(shard_format.read_manifest(data).tokenizer["vocab_size"])
    rows = -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    (tokens / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": rows}))
    return folder


def run_nanogpt(
    peer: Path, folder: Path, model: str, steps: int, batch: int, micro: int, device: str, **values: Any
) -> Iterator[tuple[float, str]]:
    """Run nanoGPT in a `prepared` folder; yield the lines that it prints, each with its time in seconds."""
    layers, heads, width, context = MODELS[model]
    settings: Mapping[str, Any] = {
        "dataset": "tokens", "out_dir": folder / "out", "device": device, "bias": True, "dropout": 0.0,
        "n_layer": layers, "n_head": heads, "n_embd": width, "block_size": context, "batch_size": micro,
        "gradient_accumulation_steps": batch // micro, "max_iters": steps, "log_interval": EVERY,
        "always_save_checkpoint": False, "eval_interval": steps + 1, "eval_iters": 1,
    } | values  # fmt: skip
    command = [sys.executable, "-u", str((peer / "train.py").resolve()), *words("", **settings)]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder) as running,
    ):
        assert running.stdout is not None
        for line in running.stdout:
            yield time.perf_counter(), line
        if running.wait():
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{errors.read()}")


def iteration(line: str) -> int | None:
    """Return the number of the iteration, from 0, that a line of nanoGPT's reports; None if it reports none."""
    found = re.match(r"iter (\d+): loss", line)
    return int(found[1]) if found else None


def machine(peer: Path) -> dict[str, Any]:
    """Describe what the figures depend on."""
    words = ["git", "-C", str(peer), "rev-parse", "HEAD"]
    head = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return about() | {"peer_commit": head or None}


def parser(words: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--peer", type=Path, required=True, metavar="DIR", help="a checkout of nanoGPT")
    made.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of uint16 token shards")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return made
