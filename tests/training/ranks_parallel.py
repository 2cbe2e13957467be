"""What test_parallel runs on 1, 2 and 4 ranks: ``-m tests.training.ranks_parallel SHARDS OUT PART STEPS``.

PART is "modes" (each mode trains, saves, and goes on; each rank writes OUT/modes_W_R.json) or "resume" (each mode goes
on from each checkpoint that there is; OUT/resume_W_R.json). Checkpoints: OUT/<mode>_<W>/checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from hpcgpt import plan
from hpcgpt.checkpoint import layout, load
from hpcgpt.checkpoint import save as checkpoint_save
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import Saver
from hpcgpt.config import options
from hpcgpt.config.options import Config
from hpcgpt.distributed import rendezvous, sharded_tensor, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model import kernels
from hpcgpt.storage.lease import acquire
from hpcgpt.training.engine import Engine

Mode = Literal["ddp", "zero1", "fsdp"]
MODES: Sequence[Mode] = ("ddp", "zero1", "fsdp")
MORE = 3  # steps after the save
SIZES = {"float": 4, "c10::BFloat16": 2}  # bytes of a number, by the profiler's names


def settings(
    shards: Path,
    mode: Mode = "ddp",
    micro_batch: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    **optim: Any,
) -> Config:
    return Config(
        data=options.Data(dir=str(shards)),
        model=options.Model(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0),
        optim=options.Optim(lr=1e-3, **optim),
        schedule=options.Schedule(warmup_steps=5, min_lr=1e-4),
        train=options.Train(steps=200, tokens=0, global_batch=16, micro_batch=micro_batch, dtype=dtype),
        parallel=options.Parallel(mode=mode),
    )


def engine(configuration: Config, ranks: Ranks) -> Engine:
    made = Engine(plan.make(configuration, ranks.world.size), ranks)
    made.warm_up()
    return made


def steps(its: Engine, numbers: Iterable[int]) -> list[tuple[float, float]]:
    """Losses and norms."""
    rows = [its.read(its.launch(step, step)) for step in numbers]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows]


def digest(its: Engine, ranks: Ranks) -> str:
    """Of every byte that this rank would save."""
    sha = hashlib.sha256()
    for name, tensor in sorted(checkpoint_save.local_state_dict(its.model.local, its.optimizer, ranks).items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def state_bytes(its: Engine) -> int:
    """What the optimizer holds on this rank, without its counters."""
    kept = [value for state in its.optimizer.state.values() for value in state.values()]
    return sum(sharded_tensor.local_rows(value).local.nbytes for value in kept if value.dim())


def save(its: Engine, ranks: Ranks, folder: Path, step: int) -> int:
    """Save; how many bytes this rank has written."""
    lease = None
    if ranks.world.is_first:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lease = acquire(folder, "")
    writes = Saver(folder / "checkpoints", ranks, lease, options.Checkpoint())
    state = State(step, step * 512, step * 16, ranks.world.size, {})
    ended = writes.begin(
        state, checkpoint_save.local_state_dict(its.model.local, its.optimizer, ranks)
    ) or writes.finish(lambda: None)
    assert ended is not None
    assert not ended.problem, ended.problem
    if lease:
        lease.release()
    path = layout.path_of(folder / "checkpoints", step)
    return (path / layout.share_name(ranks.world.rank, ranks.world.size)).stat().st_size


def trains(shards: Path, out: Path, ranks: Ranks, mode: Mode, count: int, **optim: Any) -> dict[str, Any]:
    """A run of `count` steps, and one that is saved three steps before its end and goes on in another engine.

    With other settings of the optimizer than the usual in float64.
    """
    configuration = settings(shards, mode, **optim)
    if optim:
        configuration = dataclasses.replace(
            configuration, train=dataclasses.replace(configuration.train, dtype="float64")
        )
    its = engine(configuration, ranks)
    figures = steps(its, range(count - MORE))
    folder = out / f"{'_'.join([mode, *map(str, optim.values())])}_{ranks.world.size}"
    written = save(its, ranks, folder, count - MORE)
    last = steps(its, range(count - MORE, count))
    told = {"figures": figures + last, "written": written, "state": state_bytes(its), "digest": digest(its, ranks)}
    again = engine(configuration, ranks)
    load.load(layout.path_of(folder / "checkpoints", count - MORE), again.model.local, again.optimizer, ranks)
    told["again"] = steps(again, range(count - MORE, count)) == last and digest(again, ranks) == told["digest"]
    looked_at = again.model.gather()
    weights = {name: sharded_tensor.full_tensor(share.detach()) for name, share in again.model.local.named_parameters()}
    told["gathered"] = all(torch.equal(weights[name], p) for name, p in looked_at.named_parameters())
    told["whole digest"] = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    steps(again, [count])
    told["let go"] = all(bool(parameter.isnan().all()) for parameter in looked_at.parameters())
    return told


def messages(shards: Path, ranks: Ranks, mode: Mode, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """How many bytes each collective of a step of 8 micro-batches carried, by its kind, in order; and the norm of
    all gradients of the step before, before and after clipping to 0.5.

    Gloo makes its reduce-scatter of an all-reduce, which is not counted again.
    """
    its = engine(settings(shards, mode, micro_batch=16 // (8 * ranks.world.size), dtype=dtype, clip_norm=0.5), ranks)
    clipped: list[float] = []

    def look(*_: object) -> None:
        gradients = [
            sharded_tensor.local_rows(p.grad).local for p in its.model.local.parameters() if p.grad is not None
        ]
        squared = torch.nn.utils.get_total_norm(gradients).square()
        if mode != "ddp":
            torch.distributed.all_reduce(squared)
        clipped.append(float(squared.sqrt()))

    watching = its.optimizer.register_step_pre_hook(look)
    norms = [steps(its, [0])[0][1], *clipped]
    watching.remove()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        figures = steps(its, [1])
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found: dict[str, list[int]] = {name: [] for name in ("all_reduce", "_allgather_base_", "_reduce_scatter_base_")}
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        kind = event["name"].removeprefix("c10d::").removeprefix("gloo:")
        if kind in found:
            tensors = zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True)
            found[kind].append(max(math.prod(shape) * SIZES[name] for shape, name in tensors if name in SIZES))
    for count in found["_reduce_scatter_base_"]:
        found["all_reduce"].remove(count)
    return {"sent": found, "figures": figures, "norms": norms}


def rounded(shards: Path, ranks: Ranks, mode: Mode) -> dict[str, Any]:
    """With gradients sent in bfloat16: figures, and whether each gradient that came out is such a number."""
    # One micro-batch: with fsdp sums of rounded gradients are kept in float32.
    configuration = settings(shards, mode, micro_batch=16 // ranks.world.size, clip_norm=0.0)
    configuration = dataclasses.replace(configuration, parallel=options.Parallel(mode, "bfloat16"))
    its = engine(configuration, ranks)
    seen: list[bool] = []

    def look(*_: object) -> None:
        gradients = [
            sharded_tensor.local_rows(p.grad).local for p in its.model.local.parameters() if p.grad is not None
        ]
        seen.append(all(torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients))

    its.optimizer.register_step_pre_hook(look)
    return {"figures": steps(its, range(5)), "rounded": seen == [True] * 5}


def frugal(shards: Path, ranks: Ranks, mode: Mode, compiled: bool) -> dict[str, Any]:
    """Figures of a model of as many blocks as torch may not compile each for itself: as it is, and with blocks that are
    recomputed and a loss in chunks, compiled or not. Without the compiler's last part, which takes long.
    """
    plain = settings(shards, mode)
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, n_layer=10))
    wanted = dataclasses.replace(plain.train, activation_checkpointing=True, loss_chunk=24)
    its = engine(plain, ranks)
    told: dict[str, Any] = {"plain": steps(its, range(3))}
    with (
        mock.patch.object(kernels, "compiles", lambda *_: compiled),
        mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        torch._dynamo.reset()
        its = engine(dataclasses.replace(plain, train=wanted), ranks)
        if not compiled:  # the compiler would compile the hook, too
            passes: list[int] = []
            its.model.local.get_submodule("blocks.9").register_forward_pre_hook(lambda *_: passes.append(1))
        told["frugal"] = steps(its, range(2))
        told["passes"] = 0 if compiled else len(passes)
        its.model.gather().eval()  # as an evaluation does between two steps
        its.model.gather().train()
        told["frugal"] += steps(its, [2])
        told["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()
    return told


def resumes(shards: Path, out: Path, ranks: Ranks, count: int) -> dict[str, Any]:
    """Go on from every checkpoint in every mode."""
    told = {}
    for mode in MODES if ranks.world.size > 1 else MODES[:1]:
        its = engine(settings(shards, mode), ranks)
        for folder in sorted(out.glob("*_[124]")):
            if "muon" not in folder.name:
                path = layout.path_of(folder / "checkpoints", count - MORE)
                load.load(path, its.model.local, its.optimizer, ranks)
                told[f"{folder.name} in {mode}"] = steps(its, range(count - MORE, count))
    return told


def modes(shards: Path, out: Path, ranks: Ranks, count: int) -> dict[str, Any]:
    chosen = MODES if ranks.world.size > 1 else MODES[:1]
    told: dict[str, Any] = {mode: trains(shards, out, ranks, mode, count) for mode in chosen}
    if ranks.world.size == 2:
        told |= {f"{mode} muon": trains(shards, out, ranks, mode, 12, name="muon") for mode in chosen}
        told |= {f"{mode} messages": messages(shards, ranks, mode, "float32") for mode in chosen}
        told |= {f"{mode} messages bf16": messages(shards, ranks, mode, "bfloat16") for mode in chosen}
        told |= {f"{mode} rounded": rounded(shards, ranks, mode) for mode in chosen}
        told |= {f"{mode} frugal": frugal(shards, ranks, mode, compiled=False) for mode in chosen}
        told |= {f"{mode} compiled": frugal(shards, ranks, mode, compiled=True) for mode in chosen}
    return told


def main(shards: Path, out: Path, part: str, count: int) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    told = modes(shards, out, ranks, count) if part == "modes" else resumes(shards, out, ranks, count)
    (out / f"{part}_{here.size}_{here.rank}.json").write_text(json.dumps(told))
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
