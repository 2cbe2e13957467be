"""hpcgpt/estimate/fake_step.py: steps on fake tensors, against PyTorch's own tracker and against known sums."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcgpt.config.options import Config, Eval, Model, Train
from hpcgpt.estimate import analytic, devices, estimates, fake_step, fitting
from hpcgpt.estimate.account import Memory, Moment
from hpcgpt.estimate.fake_step import resident_bytes
from hpcgpt.estimate.memory import Estimator
from hpcgpt.estimate.request import Request
from hpcgpt.estimate.storage_log import StorageLog
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.precision import computing_in
from hpcgpt.optim.optimizer import make_optimizer
from tests.estimate import compiler_loads
from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Large enough that tensors below 64 KiB count for nothing.
CONFIG = Config(
    model=Model(n_layer=2, n_head=4, n_embd=256, block_size=128, vocab_size=4096),
    train=Train(micro_batch=8, global_batch=64, dtype="float32"),
    eval=Eval(every=0),
)
MODERN = {"model__kind": "modern", "model__qkv_bias": False}
OTHER = MODERN | {"optim__name": "muon", "train__dtype": "bfloat16"}
MODES: tuple[Any, ...] = ("ddp", "zero1", "zero2", "fsdp")
measure = cache(fake_step.measure)


def request(ranks: int = 1, on_cpu: bool = False, micro_steps: int = 2, **values: Any) -> Request:
    changes = {key.replace("__", "."): value for key, value in values.items()}
    return Request(fitting.with_values(CONFIG, changes), ranks, on_cpu, micro_steps, saves_while_training=False)


def fullest(asked: Request) -> Moment:
    return step_of(measure(asked, 0))


def step_of(memory: Memory) -> Moment:
    return next(moment for moment in memory.moments if moment.phase == "step")


def tensors(moment: Moment) -> int:
    return moment.total - moment.parts["framework"]


def trackers_peak(config: Config) -> int:
    """Return the peak of two steps on one rank by PyTorch's own MemTracker."""
    # It takes three seconds to import, which the collection of all tests would cost.
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode(), MemTracker() as tracker:
        model = GPT(config.model, 1, dataclasses.replace(ForwardOptions.from_config(config, 0), attention="flash"))
        optimizer = make_optimizer(model, config.optim)
        tracker.track_external(model)
        for _ in range(2):
            tracker.reset_mod_stats()
            ids = torch.zeros(config.train.micro_batch, config.model.block_size, dtype=torch.int64)
            dtype = torch.bfloat16 if config.train.dtype == "bfloat16" else torch.float32
            with computing_in(dtype, CPU):
                loss = model(ids, ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train__dtype": "bfloat16"},
        {"train__activation_checkpointing": True},
        {"train__loss_chunk": 256},
        {"model__kind": "modern", "model__qkv_bias": False, "model__n_kv_head": 2},
        {"model__kind": "modern", "model__qkv_bias": False, "optim__name": "muon"},
    ],
    ids=str,
)
def test_the_peak_is_that_of_pytorchs_own_tracker(values: dict[str, Any]) -> None:
    asked = request(micro_steps=1, **values)
    assert tensors(fullest(asked)) == pytest.approx(trackers_peak(asked.config), rel=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [{}, OTHER], ids=str)
def test_ranks_that_shard_hold_less_than_one_rank_and_as_many_activations(mode: Any, values: dict[str, Any]) -> None:
    alone = fullest(request(1, **values))
    found = fullest(request(4, parallel__mode=mode, **values))
    if mode != "ddp":
        assert found.parts["optimizer"] < 0.5 * alone.parts["optimizer"]
        assert tensors(found) < tensors(alone)
    assert found.parts["activations"] == pytest.approx(alone.parts["activations"], rel=0.15)
    assert found.parts["logits"] == pytest.approx(alone.parts["logits"], rel=0.15)
    assert not dist.is_initialized()


def test_weights_gradients_and_optimizer_are_what_the_parameters_need() -> None:
    count = sum(parameter.numel() for parameter in GPT(CONFIG.model).parameters())
    memory = measure(request(1), 0)
    parts = step_of(memory).parts
    assert parts["weights"] == pytest.approx(4 * count, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * count, rel=0.01)
    assert memory.parameters == GPT(CONFIG.model).parameter_count()
    assert memory.flops_per_token == GPT(CONFIG.model).flops_per_token()
    assert memory.saved_bytes == pytest.approx(12 * count, rel=0.01)
    assert memory.copied_bytes == pytest.approx(12 * count, rel=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_share_the_checkpoint(mode: Any) -> None:
    alone, four = measure(request(1), 0), measure(request(4, parallel__mode=mode), 0)
    assert four.saved_bytes == alone.saved_bytes
    assert four.copied_bytes == pytest.approx(alone.copied_bytes / 4, rel=0.05)


def test_ddp_holds_its_gradients_all_the_time() -> None:
    count = sum(parameter.numel() for parameter in GPT(CONFIG.model).parameters())
    memory = measure(request(4, parallel__mode="ddp"), 0)
    for moment in memory.moments:
        assert moment.parts["gradients"] == pytest.approx(4 * count, rel=0.05), moment.phase


def test_fsdp_holds_fewer_weights_and_gradients_than_zero1() -> None:
    values: dict[str, Any] = {"model__n_layer": 4, "model__vocab_size": 512}
    zero1 = fullest(request(8, parallel__mode="zero1", **values)).parts
    fsdp = fullest(request(8, parallel__mode="fsdp", **values)).parts
    assert fsdp["weights"] < 0.6 * zero1["weights"]
    assert fsdp["gradients"] < 0.6 * zero1["gradients"]


def test_zero2_holds_the_weights_of_zero1_and_fewer_gradients() -> None:
    values: dict[str, Any] = {"model__n_layer": 4, "model__vocab_size": 512}
    zero1, zero2 = (fullest(request(8, parallel__mode=mode, **values)).parts for mode in ("zero1", "zero2"))
    assert zero2["weights"] == pytest.approx(zero1["weights"], rel=0.05)
    assert zero2["gradients"] < 0.6 * zero1["gradients"]


def test_checkpointing_chunks_and_a_smaller_micro_batch_save_what_they_should() -> None:
    plain = fullest(request()).parts
    assert fullest(request(train__activation_checkpointing=True)).parts["activations"] < 0.5 * plain["activations"]
    chunked = fullest(request(train__loss_chunk=128))
    assert tensors(chunked) < sum(plain.values())
    assert chunked.parts["logits"] < 0.3 * plain["logits"]
    smaller = fullest(request(train__micro_batch=4)).parts
    assert smaller["activations"] == pytest.approx(plain["activations"] / 2, rel=0.1)


def test_bfloat16_needs_less_and_float64_twice_as_much() -> None:
    plain = tensors(fullest(request()))
    assert tensors(fullest(request(train__dtype="bfloat16"))) < plain
    assert tensors(fullest(request(train__dtype="float64"))) == pytest.approx(2 * plain, rel=0.02)


@pytest.mark.parametrize("mode", MODES[1:])
def test_no_rank_of_a_sharded_model_holds_more_than_its_share_and_a_tensor_when_it_is_built(mode: Any) -> None:
    sizes = [4 * parameter.numel() for parameter in GPT(CONFIG.model).parameters()]
    asked = request(8, parallel__mode=mode)
    for _ in range(2):  # the first time, DTensor also computes shapes, on fake tensors of its own
        with fake_step.fake_ranks(8) as ranks, FakeTensorMode(allow_non_fake_inputs=True), StorageLog() as log:
            fake_step._Step(asked, ranks, log)
            (built,) = fake_step._moments(log, 0)
    assert built.total == pytest.approx(sum(sizes) / 8 + max(sizes), rel=0.01)
    assert max(sizes) <= measure(asked, 0).host_bytes < 1.01 * max(sizes)
    # Weights and two moments, each tensor in pinned memory.
    pinned = 3 * sum(map(fake_step.pinned_bytes, sizes))
    assert measure(request(1), 0).host_bytes == pytest.approx(pinned, rel=0.01)
    assert pinned > 1.02 * 3 * sum(sizes)


def test_torch_takes_pinned_memory_in_powers_of_two() -> None:
    """`PowerOf2Ceil` in its CachingHostAllocator.h."""
    assert [fake_step.pinned_bytes(size) for size in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_rank_holds_the_share_of_its_group_and_writes_that_of_all_ranks(mode: Any) -> None:
    count = sum(parameter.numel() for parameter in GPT(CONFIG.model).parameters())
    asked = request(8, parallel__mode=mode, parallel__shard_within="2")
    memory = measure(asked, 0)
    assert step_of(memory).parts["optimizer"] == pytest.approx(8 * count / 2, rel=0.05)
    assert memory.copied_bytes == pytest.approx(12 * count / 8, rel=0.05)
    assert memory.saved_bytes == pytest.approx(12 * count, rel=0.01)
    assert tensors(analytic.measure(asked, "").peak) == pytest.approx(tensors(step_of(memory)), rel=0.25)


@pytest.mark.processes
def test_node_is_the_number_of_its_ranks() -> None:
    config = request(train__micro_batch=4, parallel__mode="fsdp", parallel__shard_within="node").config
    device = devices.find("a100-80")
    with Estimator() as estimator:
        for ranks, per_node, expected in ((16, 4, "4"), (16, 0, "8"), (4, 0, "all")):
            found = estimates.make(
                config, steps=1, ranks=ranks, device=device, ranks_per_node=per_node, estimator=estimator
            )
            assert found.config.parallel.shard_within == expected
            assert found.memory.method == "fake tensors"


@pytest.mark.processes
def test_the_compiler_is_counted_where_a_step_loads_it() -> None:
    """In a process that has not loaded it yet."""
    ways: list[fitting.Changes] = [
        {}, {"train.loss_chunk": 16}, {"train.activation_checkpointing": True},
        {"train.deterministic": True},
    ]  # fmt: skip
    arguments = [sys.executable, "-m", "tests.estimate.compiler_loads", json.dumps(ways)]
    done = subprocess.run(arguments, cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=True)
    configs = [fitting.with_values(compiler_loads.CONFIG, values) for values in ways]
    counted = [fake_step.loads_compiler(Request(config, 1, True, 1, False)) for config in configs]
    assert json.loads(done.stdout) == counted == [False, False, True, True]


@pytest.mark.parametrize(
    ("values", "ranks", "on_cpu", "expected"),
    [
        ({"train.compile": "auto"}, 2, True, False), ({"train.compile": "auto"}, 2, False, True),
        ({"train.compile": "on"}, 1, True, True), ({"train.compile": "off"}, 2, False, False),
        ({"parallel.mode": "fsdp"}, 1, True, False), ({"parallel.mode": "zero1"}, 2, True, True),
        ({"train.compile": "off", "data.document_mask": True}, 1, False, True),
        ({"data.document_mask": True}, 1, True, False),
    ],
)  # fmt: skip
def test_the_compiler_is_counted_for_compiled_and_sharded_models(
    values: fitting.Changes, ranks: int, on_cpu: bool, expected: bool
) -> None:
    config = fitting.with_values(compiler_loads.CONFIG, values)
    assert fake_step.loads_compiler(Request(config, ranks, on_cpu, 1, False)) is expected


def test_an_evaluation_with_fsdp_gathers_block_by_block() -> None:
    memory = measure(request(8, parallel__mode="fsdp", model__n_layer=4, eval__every=10), 0)
    evaluation = next(moment for moment in memory.moments if moment.phase == "evaluation")
    model = GPT(dataclasses.replace(CONFIG.model, n_layer=4))
    count, in_blocks = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks))
    held, gathered = count / 8, count - in_blocks + in_blocks / 8
    assert 0.99 * 4 * (held + gathered) <= evaluation.parts["weights"] < 4 * (held + gathered + 2 * in_blocks / 4)
    assert evaluation.parts["optimizer"] == pytest.approx(8 * count / 8, rel=0.05)


def test_a_cpu_counts_the_copy_of_a_checkpoint_and_the_process_itself() -> None:
    asked = dataclasses.replace(request(2, on_cpu=True), saves_while_training=True)
    memory = measure(asked, 10**9)
    assert memory.peak.phase == "save"
    assert memory.peak.parts["framework"] == 10**9
    step = next(moment for moment in memory.moments if moment.phase == "step")
    assert memory.peak.total == step.total + memory.copied_bytes == memory.host_bytes


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        *(({}, mode) for mode in MODES),
        *((OTHER, mode) for mode in MODES),
        *(({"train__activation_checkpointing": True}, mode) for mode in ("ddp", "fsdp")),
        *(({"train__loss_chunk": 64}, mode) for mode in ("ddp", "zero2")),
    ],
    ids=str,
)
def test_the_analytic_account_is_near(mode: Any, values: dict[str, Any]) -> None:
    """What is used without torch is coarse: within a quarter."""
    asked = request(4, parallel__mode=mode, **values)
    assert tensors(analytic.measure(asked, "").peak) == pytest.approx(tensors(fullest(asked)), rel=0.25)


def test_the_analytic_account_counts_parameters_as_the_model_does() -> None:
    for values in (
        {"model__vocab_size": 4099}, {"model__tied": False, "model__vocab_size": 4099},
        {"model__kind": "modern", "model__qkv_bias": False, "model__n_kv_head": 2, "model__vocab_size": 4099},
        {"model__qkv_bias": False}, {"model__mlp_width": 100},
        {"model__kind": "modern", "model__head_size": 10, "model__mlp_width": 100, "model__qk_norm": False},
    ):  # fmt: skip
        model = request(**values).config.model
        assert analytic.parameter_count(model) == GPT(model).parameter_count()
        assert analytic.flops_per_token(model) == GPT(model).flops_per_token()


def test_a_large_model_needs_no_memory_of_this_machine() -> None:
    """A model of 60 GB of weights and state, on the CPU of a test."""
    before = resident_bytes()
    model: dict[str, Any] = {
        "model__n_layer": 2,
        "model__n_embd": 12_288,
        "model__n_head": 96,
        "model__vocab_size": 50_257,
    }
    found = measure(request(1, **model), 0)
    assert found.peak.total > 60e9
    assert resident_bytes() - before < 1e9
