"""The program of test_step on 1, 2 and 4 ranks: ``torchrun -m tests.training.ranks_step SHARDS OUT``.

Each rank writes OUT/rank_R.json; rank 0 also the gradients, OUT/gradients.safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from hpcgpt.config.options import Model, Optim, Parallel
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.loader import Loader, Mixture, Windows
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.training.parallel import parallelize
from hpcgpt.training.step import totals, train_step
from tests.training.traces import trace_events

GLOBAL_BATCH = 16
ACCUMULATIONS = (1, 2, 4)
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Bench:
    """A model, its optimizer and its batches on this rank; `used_gradients` are those that the last step applied."""

    def __init__(self, ranks: Ranks, folder: Path, micro_steps: int, dtype: torch.dtype, dropout: float = 0.0) -> None:
        config = Model(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=512, dropout=dropout)
        self.ranks, self.micro_steps = ranks, micro_steps
        self.model = GPT(config, seed=1).to(dtype)
        self.parallel = parallelize(self.model, ranks, Parallel(), seed=1, compiled=False, dtype=dtype)
        self.optimizer = make_optimizer(self.model, Optim(lr=5.0))  # each step is given its own rate
        self.optimizer.register_step_pre_hook(self._record_gradients)
        self.used_gradients: dict[str, Tensor] = {}
        split = shard_reader.open_split(folder, shard_format.read_manifest(folder), "train")
        size = ranks.world.size
        self.loader = Loader(
            mixture=Mixture([Windows(split, 32, 32, 512)]), seed=1, rank=ranks.world.rank, world_size=size,
            global_batch=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH // (size * micro_steps),
        )  # fmt: skip

    def step(self, number: int, clip_norm: float) -> tuple[Tensor, Tensor]:
        batches = (self.loader.batch(number, m) for m in range(self.micro_steps))
        result = train_step(
            self.parallel, self.optimizer, batches, micro_steps=self.micro_steps, rate=1e-3, clip_norm=clip_norm,
            precision=nullcontext, ranks=self.ranks,
        )  # fmt: skip
        return totals(result.micro_losses, (), self.ranks)[0], result.norm

    def _record_gradients(self, *_: Any) -> None:
        self.used_gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def gradients(ranks: Ranks, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return loss, norm and gradient of one unclipped step, for each precision and number of micro-steps."""
    report: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for precision, dtype in DTYPES.items():
        for micro_steps in ACCUMULATIONS:
            bench = Bench(ranks, folder, micro_steps, dtype)
            loss, norm = bench.step(3, clip_norm=0)
            name = f"{precision}/{micro_steps}"
            report[name] = {"loss": loss.item(), "norm": norm.item(), "digest": digest(bench.used_gradients)}
            tensors |= {f"{name}/{key}": value for key, value in bench.used_gradients.items()}
    return report, tensors


def forty_steps(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Return weights and norms of a run in which every step is clipped, with dropout, on two micro-steps."""
    torch.manual_seed(ranks.world.rank)
    bench = Bench(ranks, folder, 2, torch.float32, dropout=0.1)
    norms, used = [], []
    for step in range(40):
        _, norm = bench.step(step, clip_norm=0.05)
        norms.append(norm.item())
        used.append(nn.utils.get_total_norm(bench.used_gradients.values()).item())
    return {"norms": norms, "used": used, "digest": digest(bench.model.state_dict())}


def reductions(ranks: Ranks, folder: Path) -> list[int]:
    """Return how many numbers each all-reduce carried, in order, in a step for each of ACCUMULATIONS."""
    benches = [Bench(ranks, folder, micro_steps, torch.float32) for micro_steps in ACCUMULATIONS]
    for bench in benches:
        bench.step(0, clip_norm=1.0)  # DDP makes its buckets
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for bench in benches:
            bench.step(1, clip_norm=1.0)
    sent = [event["args"]["Input Dims"] for event in trace_events(profiled) if event["name"] == "gloo:all_reduce"]
    return [math.prod(shapes[0]) for shapes in sent]


def in_buckets(ranks: Ranks, folder: Path) -> list[bool]:
    """Return whether every gradient is part of a bucket: before each micro-batch of the second step, and at its end."""
    bench = Bench(ranks, folder, 2, torch.float32)
    found: list[bool] = []

    def record(*_: object) -> None:
        gradients = [parameter.grad for parameter in bench.model.parameters()]
        found.append(all(g is not None and g.untyped_storage().nbytes() > g.nbytes for g in gradients))

    bench.step(0, clip_norm=1.0)
    bench.parallel.module.register_forward_pre_hook(record)
    bench.optimizer.register_step_pre_hook(record)
    bench.step(1, clip_norm=1.0)
    return found


def digest(tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    report_of_gradients, tensors = gradients(ranks, folder)
    report = {
        "gradients": report_of_gradients, "forty": forty_steps(ranks, folder),
        "reductions": reductions(ranks, folder),
    }  # fmt: skip
    report["in_buckets"] = in_buckets(ranks, folder)
    (out / f"rank_{here.rank}.json").write_text(json.dumps(report))
    if here.is_first:
        save_file(tensors, out / "gradients.safetensors")
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
