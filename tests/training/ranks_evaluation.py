"""The program of test_evaluation on 2 and 4 ranks: ``-m tests.training.ranks_evaluation SHARDS OUT``; see `measure`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcgpt.config.options import Model
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.loader import Windows
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.tokenizer import save_load
from hpcgpt.training.evaluation import EvalContext, evaluate

CONTEXT, MICRO_BATCH = 32, 3
BATCHES = (1, 5, 7, 0)  # none but 0 is a multiple of 2 or 4; 0 is the whole split


def model_and_windows(folder: Path, seed: int = 1) -> tuple[GPT, Windows, np.ndarray[Any, Any]]:
    """Return a model whose predictions are not uniform, the validation windows, and the bytes of each id."""
    manifest = shard_format.read_manifest(folder)
    tokenizer = save_load.load(folder / "tokenizer")
    size = tokenizer.vocab_size
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=CONTEXT, vocab_size=size, dropout=0.2), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return (
        model,
        Windows(shard_reader.open_split(folder, manifest, "val"), CONTEXT, CONTEXT, size),
        tokenizer.token_bytes,
    )


def measure(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Return the figures for each of BATCHES, and the result of a stop on the last rank at the third poll."""
    model, windows, token_bytes = model_and_windows(folder)
    report: dict[str, Any] = {
        str(batches): evaluate(model, windows, EvalContext(batches, MICRO_BATCH, token_bytes, ranks))
        for batches in BATCHES
    }
    polls = 0

    def stopped() -> bool:
        nonlocal polls
        polls += 1
        return polls == 3

    model.train()
    report["stopped"] = evaluate(model, windows, EvalContext(0, MICRO_BATCH, token_bytes, ranks, stopped=stopped))
    report["polls"], report["training"] = polls, model.training
    return report


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    (out / f"rank_{here.rank}.json").write_text(json.dumps(measure(ranks, folder)))
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
