"""The program of test_parallel on 1, 2 and 4 ranks: ``-m tests.training.ranks_parallel SHARDS OUT PART STEPS``.

PART is "modes" (each mode trains, saves and continues, on 4 ranks also with parallel.shard_within; each rank writes
OUT/modes_W_R.json) or "resume" (each mode continues from checkpoints of others; OUT/resume_W_R.json). Checkpoints:
OUT/<mode>_<W>/checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from hpcgpt import plan
from hpcgpt.checkpoint import layout, load
from hpcgpt.checkpoint import save as checkpoint_save
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import Saver
from hpcgpt.config import operation, options
from hpcgpt.config.options import Config
from hpcgpt.distributed import rendezvous, sharded_tensor, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT
from hpcgpt.storage.lease import acquire
from hpcgpt.tasks.likelihood import Computation, loglikelihoods
from hpcgpt.tasks.requests import Request
from hpcgpt.tokenizer import save_load
from hpcgpt.training.engine import Engine
from hpcgpt.training.evaluation import EvalContext, evaluate
from hpcgpt.training.parallel import ParallelModel
from hpcgpt.training.samples import Sampler
from hpcgpt.training.step import to_inputs_and_targets
from tests.one_rank import ALONE
from tests.training.traces import trace_events

Mode = Literal["ddp", "zero1", "zero2", "fsdp"]
MODES: Sequence[Mode] = ("ddp", "zero1", "zero2", "fsdp")
MORE = 3  # steps after the save
FEW, MANY, MUON_STEPS = 6, 50, 6
GROUPED: Sequence[tuple[Mode, str]] = (("zero1", "2"), ("zero2", "2"), ("fsdp", "2"))  # two groups of two ranks
SIZES = {"float": 4, "c10::BFloat16": 2}  # bytes of a number, by the profiler's names


def settings(
    shards: Path,
    mode: Mode = "ddp",
    micro_batch: int = 2,
    dtype: Literal["float32", "bfloat16"] = "float32",
    within: str = "all",
    **optim: Any,
) -> Config:
    return Config(
        data=options.Data(dir=str(shards)),
        model=options.Model(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0),
        optim=options.Optim(lr=1e-3, **optim),
        schedule=options.Schedule(warmup_steps=3, min_lr=1e-4),
        train=options.Train(steps=200, tokens=0, global_batch=16, micro_batch=micro_batch, dtype=dtype),
        parallel=options.Parallel(mode=mode, shard_within=within),
    )


def make_engine(configuration: Config, ranks: Ranks) -> Engine:
    made = Engine(plan.make(configuration, ranks.world.size), ranks)
    made.warm_up()
    return made


def steps(engine: Engine, numbers: Iterable[int]) -> list[tuple[float, float]]:
    """Run these steps; return losses and norms."""
    rows = [engine.read(engine.launch(step, step)) for step in numbers]
    return [(row["train/loss"], row["train/grad_norm"]) for row in rows]


def digest(engine: Engine, ranks: Ranks) -> str:
    """Return a digest of every byte that this rank would save."""
    sha = hashlib.sha256()
    for name, tensor in sorted(checkpoint_save.local_state_dict(engine.model.gpt, engine.optimizer, ranks).items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def state_bytes(engine: Engine) -> int:
    """Return the bytes of the optimizer's state on this rank, without its counters."""
    kept = [value for state in engine.optimizer.state.values() for value in state.values()]
    return sum(sharded_tensor.local_rows(value).local.nbytes for value in kept if value.dim())


def save(engine: Engine, ranks: Ranks, folder: Path, step: int) -> int:
    """Save a checkpoint; return the bytes that this rank has written."""
    lease = None
    if ranks.world.is_first:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lease = acquire(folder, "")
    writes = Saver(folder / "checkpoints", ranks, lease, options.Checkpoint())
    state = State(step, step * 512, step * 16, ranks.world.size, {})
    ended = writes.begin(
        state, checkpoint_save.local_state_dict(engine.model.gpt, engine.optimizer, ranks)
    ) or writes.finish(lambda: None)
    assert ended is not None
    assert not ended.problem, ended.problem
    if lease:
        lease.release()
    path = layout.path_of(folder / "checkpoints", step)
    return (path / layout.share_name(ranks.world.rank, ranks.world.size)).stat().st_size


def train_and_resume(
    shards: Path, out: Path, ranks: Ranks, mode: Mode, count: int, within: str = "all", **optim: Any
) -> dict[str, Any]:
    """Report a run of `count` steps, saved three steps before its end, and another engine that continues from there.

    `optim` are other settings of the optimizer; with them the run computes in float64, and makes no samples.
    """
    configuration = settings(shards, mode, within=within, **optim)
    if optim:
        configuration = dataclasses.replace(
            configuration, train=dataclasses.replace(configuration.train, dtype="float64")
        )
    engine = make_engine(configuration, ranks)
    drawn = GPT(engine.model.gpt.config, configuration.run.seed).to(engine.dtype).state_dict()
    begins_alike = all(torch.equal(drawn[name], tensor) for name, tensor in full_weights(engine).items())
    figures = steps(engine, range(count - MORE))
    name = mode if within == "all" else f"{mode}-{within}"
    folder = out / f"{'_'.join([name, *map(str, optim.values())])}_{ranks.world.size}"
    written = save(engine, ranks, folder, count - MORE)
    last = steps(engine, range(count - MORE, count))
    report = {
        "figures": figures + last,
        "written": written,
        "state": state_bytes(engine),
        "digest": digest(engine, ranks),
        "begins_alike": begins_alike,
    }
    resumed = make_engine(configuration, ranks)
    load.load(layout.path_of(folder / "checkpoints", count - MORE), resumed.model.gpt, resumed.optimizer, ranks)
    report["resumed"] = (
        steps(resumed, range(count - MORE, count)) == last and digest(resumed, ranks) == report["digest"]
    )
    weights = full_weights(resumed)
    report["full_digest"] = hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()
    plain = with_all(weights, resumed)
    report |= evaluations(resumed, ranks, plain) | tasks(resumed, ranks, plain)
    return report if optim else report | samples(resumed, ranks, plain, shards)


def full_weights(engine: Engine) -> dict[str, Tensor]:
    return {name: sharded_tensor.full_tensor(own.detach()) for name, own in engine.model.gpt.named_parameters()}


def with_all(weights: dict[str, Tensor], engine: Engine) -> GPT:
    """Return the same model with all of its weights."""
    gpt = engine.model.gpt
    plain = GPT(gpt.config, options=gpt.options).to(engine.dtype).eval()
    plain.load_state_dict(weights, strict=False)  # without a second name of a tied head
    return plain


def evaluations(engine: Engine, ranks: Ranks, plain: GPT) -> dict[str, Any]:
    """Report whether the model evaluates as `plain`; how many bytes of weights it holds meanwhile, and afterwards."""
    gpt = engine.model.gpt
    inputs, targets = to_inputs_and_targets(engine.loader.batch(ranks.world.rank, 0), ranks.device)
    held: list[int] = []

    def note(*_: object) -> None:
        held.append(sum(map(bytes_here, gpt.blocks.parameters())))

    with torch.no_grad(), engine.model.evaluating() as evaluated:
        evaluated.eval()
        for block in evaluated.blocks:
            block.register_forward_hook(note, prepend=True)  # before FSDP frees it
        same = [torch.equal(evaluated(inputs, targets), plain(inputs, targets)) for _ in range(2)]
        same.append(torch.equal(evaluated.hidden(inputs), plain.hidden(inputs)))
        evaluated.train()
        losses = [loss_of(evaluated, engine, ranks, ranks), loss_of(plain, engine, ALONE, ranks)]
        same.append(abs(losses[0] - losses[1]) < 1e-12)
    after = sum(map(bytes_here, gpt.parameters()))
    return {"evaluates": all(same), "held": max(held), "after": after, "all": sum(map(bytes_here, plain.parameters()))}


def loss_of(model: GPT, engine: Engine, divided: Ranks, ranks: Ranks) -> float:
    """Return the loss of one batch more than there are `ranks`, divided among `divided`: the last round has one."""
    in_step = engine.model.in_step and divided is ranks
    one_byte = np.ones(model.config.vocab_size, dtype=np.int64)
    context = EvalContext(ranks.world.size + 1, 2, one_byte, divided, in_step=in_step)
    figures = evaluate(model, engine.loader.mixture.sets[0], context)
    assert figures is not None
    return figures["val/loss"]


def tasks(engine: Engine, ranks: Ranks, plain: GPT) -> dict[str, Any]:
    """Report whether the log-likelihoods of requests, one more than there are ranks, are those of `plain`."""
    requests = [Request((7, 8, 9)[: 1 + number % 3], (number, 5)) for number in range(ranks.world.size + 1)]
    with engine.model.evaluating() as gpt:
        how = Computation(1, ranks, in_step=engine.model.in_step)
        return {"scores": loglikelihoods(gpt, requests, how) == loglikelihoods(plain, requests, Computation(1, ALONE))}


def samples(engine: Engine, ranks: Ranks, plain: GPT, shards: Path) -> dict[str, Any]:
    """Report whether the text of rank 0 is that of `plain`, also with an end after 3 tokens; then let rank 0 fail.

    And whether training's random numbers are untouched, also with dropout.
    """
    left, random = 0, torch.get_rng_state()
    gpt = engine.model.gpt.train()
    gpt.dropout.p = 0.5

    def alive() -> bool:
        nonlocal left
        left -= 1
        return left > 0

    def failing() -> bool:
        if alive() or not ranks.world.is_first:
            return True
        raise OSError("no terminal")

    tokenizer, settings = save_load.load(shards / "tokenizer"), operation.Sample(tokens=40)  # longer than the window
    sampler = Sampler(engine.model, ranks, tokenizer, settings, 1, engine.dtype)
    alone = Sampler(ParallelModel(plain, plain, ranks.device), ALONE, tokenizer, settings, 1, engine.dtype)
    found = []
    for limit in (1000, 3):
        texts = []
        for one in (sampler, alone):
            left = limit
            texts.append(one.generate(step=3, limit_s=600, alive=alive))
        found.append(texts[0] == (texts[1] if ranks.world.is_first else ""))
    left = 3
    with suppress(OSError):
        sampler.generate(step=3, limit_s=600, alive=failing)
    gpt.dropout.p = 0.0
    return {"samples": [*found, gpt.training and torch.equal(random, torch.get_rng_state())]}


def bytes_here(tensor: Tensor) -> int:
    return sharded_tensor.local_rows(tensor.detach()).local.nbytes


def collectives(shards: Path, ranks: Ranks, mode: Mode, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """Return the bytes that each collective of a step of 8 micro-batches carried, by kind, in order; and the norm of
    all gradients of the step before, before and after clipping to 0.5.

    Gloo implements reduce-scatter as an all-reduce, which is not counted again.
    """
    engine = make_engine(
        settings(shards, mode, micro_batch=16 // (8 * ranks.world.size), dtype=dtype, clip_norm=0.5), ranks
    )
    clipped: list[float] = []

    def record(*_: object) -> None:
        gradients = [
            sharded_tensor.local_rows(p.grad).local for p in engine.model.gpt.parameters() if p.grad is not None
        ]
        squared = torch.nn.utils.get_total_norm(gradients).square()
        if mode != "ddp":
            torch.distributed.all_reduce(squared)
        clipped.append(float(squared.sqrt()))

    watching = engine.optimizer.register_step_pre_hook(record)
    norms = [steps(engine, [0])[0][1], *clipped]
    watching.remove()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        figures = steps(engine, [1])
    found: dict[str, list[int]] = {name: [] for name in ("all_reduce", "_allgather_base_", "_reduce_scatter_base_")}
    for event in trace_events(profiled):
        kind = event["name"].removeprefix("c10d::").removeprefix("gloo:")
        if kind in found:
            tensors = zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True)
            found[kind].append(max(math.prod(shape) * SIZES[name] for shape, name in tensors if name in SIZES))
    for count in found["_reduce_scatter_base_"]:
        found["all_reduce"].remove(count)
    return {"sent": found, "figures": figures, "norms": norms}


def trained_alike(shards: Path, ranks: Ranks, ways: list[str]) -> bool:
    """Return whether some steps with each parallel.shard_within end with the same bytes on this rank."""
    ends = set()
    for within in ways:
        engine = make_engine(settings(shards, "fsdp", within=within), ranks)
        figures = steps(engine, range(4))
        ends.add((str(figures), digest(engine, ranks)))
    return len(ends) == 1


def between_groups(shards: Path, ranks: Ranks) -> list[int]:
    """Return the bytes of each all-reduce between the groups, in a step of 4 micro-batches."""
    engine = make_engine(settings(shards, "fsdp", micro_batch=1, within="2"), ranks)
    assert engine.model.mesh is not None
    group, found = engine.model.mesh.get_group("groups"), []
    real = torch.distributed.all_reduce

    def counted(tensor: Tensor, *given: Any, **named: Any) -> Any:
        if named.get("group") is group:
            found.append(tensor.nbytes)
        return real(tensor, *given, **named)

    with mock.patch.object(torch.distributed, "all_reduce", counted):
        steps(engine, [0])
    return found


def rounded_gradients(shards: Path, ranks: Ranks, mode: Mode) -> dict[str, Any]:
    """With gradients sent in bfloat16: return figures, and whether each resulting gradient is a bfloat16 number."""
    # One micro-batch: fsdp keeps sums of rounded gradients in float32.
    configuration = settings(shards, mode, micro_batch=16 // ranks.world.size, clip_norm=0.0)
    configuration = dataclasses.replace(configuration, parallel=options.Parallel(mode, "bfloat16"))
    engine = make_engine(configuration, ranks)
    seen: list[bool] = []

    def record(*_: object) -> None:
        gradients = [
            sharded_tensor.local_rows(p.grad).local for p in engine.model.gpt.parameters() if p.grad is not None
        ]
        seen.append(all(torch.equal(gradient, gradient.bfloat16().float()) for gradient in gradients))

    engine.optimizer.register_step_pre_hook(record)
    return {"figures": steps(engine, range(5)), "rounded": seen == [True] * 5}


def memory_savings(shards: Path, ranks: Ranks, mode: Mode, compiled: bool) -> dict[str, Any]:
    """Report figures of a model, if `compiled` with more blocks than torch compiles separately: plain, and with
    activation checkpointing and a loss in chunks, compiled or not. Without the compiler's slow last stage.
    """
    plain, blocks = settings(shards, mode), 10 if compiled else 2
    plain = dataclasses.replace(plain, model=dataclasses.replace(plain.model, n_layer=blocks))
    saving_options = dataclasses.replace(plain.train, activation_checkpointing=True, loss_chunk=24)
    engine = make_engine(plain, ranks)
    report: dict[str, Any] = {"plain": steps(engine, range(3))}
    with (
        mock.patch.object(kernels, "compiles", lambda *_: compiled),
        mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        torch._dynamo.reset()
        engine = make_engine(dataclasses.replace(plain, train=saving_options), ranks)
        if not compiled:  # the compiler would compile the hook, too
            passes: list[int] = []
            engine.model.gpt.get_submodule(f"blocks.{blocks - 1}").register_forward_pre_hook(
                lambda *_: passes.append(1)
            )
        report["saving"] = steps(engine, range(2))
        report["passes"] = 0 if compiled else len(passes)
        with torch.no_grad(), engine.model.evaluating() as gpt:  # as between two steps
            gpt.eval()(torch.zeros(1, 5, dtype=torch.int64))
            gpt.train()
        report["saving"] += steps(engine, [2])
        report["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        torch._dynamo.utils.counters.clear()
    return report


def modes_on(ranks: int, count: int) -> Sequence[Mode]:
    """Return the modes in which so many ranks train: on 4 ranks, unless with MANY steps, the two that differ most."""
    if ranks == 1:
        return MODES[:1]
    return MODES if ranks == 2 or count >= MANY else ("ddp", "fsdp")


def resumed_from(mode: str, ranks: int, count: int) -> list[str]:
    """Return the folders whose checkpoints `mode` continues from on so many ranks.

    With MANY steps, and on one rank, all of them. Else those of one rank and, on the other number of ranks, of this
    mode and of every second one.
    """
    if count >= MANY or ranks == 1:
        return [f"{other}_{size}" for size in (1, 2, 4) for other in modes_on(size, count)]
    others = modes_on(6 - ranks, count)
    half = others[MODES.index(mode) % 2 :: 2]
    return ["ddp_1", *(f"{other}_{6 - ranks}" for other in others if other == mode or other in half)]


def resume_all(shards: Path, out: Path, ranks: Ranks, count: int) -> dict[str, Any]:
    """Continue from the checkpoints of other modes and numbers of ranks, in every mode; return figures."""
    report = {}
    for mode in modes_on(ranks.world.size, count):
        engine = make_engine(settings(shards, mode), ranks)
        for folder in resumed_from(mode, ranks.world.size, count):
            path = layout.path_of(out / folder / "checkpoints", count - MORE)
            load.load(path, engine.model.gpt, engine.optimizer, ranks)
            report[f"{folder} in {mode}"] = steps(engine, range(count - MORE, count))
    return report


def modes(shards: Path, out: Path, ranks: Ranks, count: int) -> dict[str, Any]:
    """Train in each mode, and return the reports. Compiling takes a minute: only with many steps."""
    compiled = count >= MANY
    chosen = modes_on(ranks.world.size, count)
    report: dict[str, Any] = {mode: train_and_resume(shards, out, ranks, mode, count) for mode in chosen}
    if ranks.world.size == 2:
        report |= {
            f"{mode} muon": train_and_resume(shards, out, ranks, mode, MUON_STEPS, name="muon") for mode in chosen
        }
        report |= {f"{mode} messages": collectives(shards, ranks, mode, "float32") for mode in chosen}
        report |= {f"{mode} messages bf16": collectives(shards, ranks, mode, "bfloat16") for mode in chosen}
        report |= {f"{mode} rounded": rounded_gradients(shards, ranks, mode) for mode in chosen}
        report |= {f"{mode} saving": memory_savings(shards, ranks, mode, compiled=False) for mode in chosen}
    if ranks.world.size == 2 and compiled:
        report |= {f"{mode} compiled": memory_savings(shards, ranks, mode, compiled=True) for mode in chosen}
    if ranks.world.size == 4 and not compiled:
        report["groups"] = groups(shards, out, ranks, count)
    return report


def groups(shards: Path, out: Path, ranks: Ranks, count: int) -> dict[str, Any]:
    """Report runs of 4 ranks in two groups of two, steps there from other checkpoints, and elsewhere from those."""
    report: dict[str, Any] = {
        f"{mode} {within}": train_and_resume(shards, out, ranks, mode, count, within) for mode, within in GROUPED
    }
    report["muon"] = train_and_resume(shards, out, ranks, "fsdp", count, "2", name="muon")
    for name, within, others in (("into", "2", ["ddp_1", "fsdp_4"]), ("from", "all", ["fsdp-2_4", "zero1-2_4"])):
        engine = make_engine(settings(shards, "fsdp", within=within), ranks)
        report[name] = []
        for other in others:
            path = layout.path_of(out / other / "checkpoints", count - MORE)
            load.load(path, engine.model.gpt, engine.optimizer, ranks)
            report[name].append(steps(engine, range(count - MORE, count)))
    report["alike"] = trained_alike(shards, ranks, ["all", "4"])
    report["between"] = between_groups(shards, ranks)
    report["rows"] = [rows_in_groups(rows) for rows in (1, 2, 4, 7, 9)]
    return report


def rows_in_groups(rows: int) -> list[int]:
    """Return the rows of a tensor of so many rows that this rank saves."""
    layer = torch.nn.Linear(2, rows, bias=False)
    expected = layer.weight.detach().fill_(0.0).add_(torch.arange(rows).unsqueeze(1)).clone()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("groups", "shards")))
    mine = sharded_tensor.rows_to_save(layer.weight.detach())
    assert torch.equal(mine.local, expected[mine.start : mine.stop])
    return list(range(mine.start, mine.stop))


def main(shards: Path, out: Path, part: str, count: int) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    report = {"modes": modes, "resume": resume_all}[part](shards, out, ranks, count)
    (out / f"{part}_{here.size}_{here.rank}.json").write_text(json.dumps(report))
    torch.distributed.barrier()  # others may still connect a group through rank 0's store
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
