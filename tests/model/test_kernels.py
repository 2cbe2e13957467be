"""hpcgpt.model.kernels: the configured kernels compute, and what is not available is refused."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from hpcgpt import plan, train
from hpcgpt.config import sources
from hpcgpt.config.options import Model
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.exit_codes import FINISHED
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.training.engine import Engine
from tests.programs import ROOT, clean_env, command
from tests.tiny_run import rows, tensors

ALONE = World(0, 0, 1, 1, "alone", "test")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("math", "aten::_scaled_dot_product_attention_math"),
        ("flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        ("auto", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ],
)
def test_the_configured_kernel_computes(name: kernels.Attention, kernel: str) -> None:
    q = torch.ones(1, 2, 16, 8)
    with profile(activities=[ProfilerActivity.CPU]) as found, kernels.attention(name, CPU, torch.float32)():
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    names = {event.key for event in found.key_averages() if event.key.startswith("aten::_scaled_dot")}
    assert names == {kernel}


@pytest.mark.processes
@pytest.mark.parametrize("name", ["cudnn", "efficient", "fa3"])
def test_a_kernel_for_gpus_is_refused_on_a_cpu(name: str, tiny: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--train.attention", name)
    assert done.returncode == 2
    assert f"train.attention {name} is for GPUs: on a CPU use auto, flash, math" in done.stderr


@pytest.mark.parametrize("name", ["cudnn", "fa3"])
def test_kernels_of_nvidia_are_refused_where_torch_is_built_for_amd(
    name: kernels.Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1.52802")
    with pytest.raises(ValueError, match=rf"train\.attention {name} is for NVIDIA GPUs"):
        kernels.attention(name, GPU, torch.bfloat16)


def test_flash_attention_3_needs_its_package() -> None:
    with pytest.raises(ValueError, match="needs the package flash_attn_interface"):
        kernels.attention("fa3", GPU, torch.bfloat16)


@pytest.mark.parametrize("name", ["flash", "cudnn", "fa3"])
def test_a_bfloat16_kernel_is_refused_in_another_precision(name: kernels.Attention) -> None:
    with pytest.raises(
        ValueError, match=rf"train\.attention {name} computes in bfloat16 on a GPU, but this run computes in float"
    ):
        kernels.attention(name, GPU, torch.float32)
    others: tuple[kernels.Attention, ...] = ("auto", "efficient", "math")
    for other in others:
        kernels.attention(other, GPU, torch.float32)
    kernels.attention("flash", CPU, torch.float64)


@pytest.mark.slow
def test_code_compiled_for_one_kernel_is_not_used_for_another() -> None:
    """In one process because of the model's options; between processes because of the key of the cache on disk."""
    shape, ids = Model(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=100), torch.zeros(2, 64).long()
    torch._dynamo.reset()
    requested: tuple[kernels.Attention, ...] = ("math", "flash", "auto", "math")
    found, names = [], []
    for name in requested:
        context = kernels.attention(name, CPU, torch.float32)
        model = torch.compile(GPT(shape, options=ForwardOptions(attention=name)), backend="aot_eager")
        with profile(activities=[ProfilerActivity.CPU]) as seen, context():
            model(ids, ids).backward()
        found.append(
            "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in seen.key_averages()}
        )
        names.append(torch.compiler.config.cache_key_tag)
    assert found == [False, True, True, False]
    assert names == [" attention: math", " attention: flash", "", " attention: math"]


COMPILED_CHUNKS = """
import sys
import torch
from torch._dynamo.utils import counters
from hpcgpt.config.options import Model
from hpcgpt.model import kernels
from hpcgpt.model.gpt import GPT, ForwardOptions
kernels.attention("auto", torch.device("cpu"), torch.float32)
shape = Model(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=100)
ids = torch.arange(128).view(2, 64) % 100
eager = GPT(shape, options=ForwardOptions(z_loss=float(sys.argv[1])))
compiled = GPT(shape, options=ForwardOptions(loss_chunk=32, z_loss=float(sys.argv[1])))
(eager(ids, ids) / 3).backward()
(torch.compile(compiled)(ids, ids) / 3).backward()
for expected, found in zip(eager.parameters(), compiled.parameters(), strict=True):
    assert (found.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()
print([key for key in sorted(counters["aot_autograd"]) if "cache" in key])
"""


@pytest.mark.processes
@pytest.mark.long
def test_a_model_with_loss_chunks_is_compiled_once_for_all_starts(tmp_path: Path) -> None:
    """Its gradients are those of the uncompiled model, also from the cache; another loss is compiled again."""
    env = clean_env() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    found = []
    for z_loss in ("0", "0", "0.1"):
        start = [sys.executable, "-c", COMPILED_CHUNKS, z_loss]
        done = subprocess.run(start, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    new = "['autograd_cache_miss', 'autograd_cache_saved']\n"
    assert found == [new, "['autograd_cache_hit']\n", new]


@pytest.mark.processes
def test_another_kernel_computes_the_same_function(tiny: Path) -> None:
    runs = tiny.parent / "runs"
    for name in ("math", "flash"):
        flags = ("--run.name", name, "--train.attention", name, "--train.dtype", "float64")
        assert command("hpcgpt.train", str(tiny), *flags).returncode == FINISHED
    losses = [[row["train/loss"] for row in rows(runs / name / "metrics.jsonl")] for name in ("math", "flash")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    weights = [tensors(runs / name / "checkpoints/step_000000012") for name in ("math", "flash")]
    assert weights[0] != weights[1], "both used the same kernel"  # losses may be equal to their last bit


@pytest.mark.slow
def test_the_configured_kernel_also_recomputes_in_the_backward_pass(tiny: Path) -> None:
    settings = sources.from_file(tiny)
    options = replace(settings.train, attention="math", activation_checkpointing=True, dtype="float32")
    engine = Engine(plan.make(replace(settings, train=options), 1), Ranks(ALONE, CPU, None))
    for work in (engine.warm_up, lambda: engine.launch(0, 0)):
        with profile(activities=[ProfilerActivity.CPU]) as found:
            work()
        names = {event.key for event in found.key_averages() if event.key.startswith("aten::_scaled_dot")}
        assert names == {"aten::_scaled_dot_product_attention_math"}


def state_of_torch() -> tuple[object, ...]:
    import torch._inductor.config as inductor

    filling: Any = torch.utils.deterministic
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, inductor.deterministic, filling.fill_uninitialized_memory


def test_deterministic_kernels_are_set_inside_of_the_context_and_what_was_before_outside() -> None:
    context = kernels.deterministic(kernels.attention("math", CPU, torch.float32), CPU)
    q, filling = torch.ones(1, 2, 16, 8), cast(Any, torch.utils.deterministic)
    try:
        for before in ((False, False, False, True), (True, True, True, True), (True, False, True, False)):
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            filling.fill_uninitialized_memory = before[3]
            with pytest.raises(KeyError), context(), context():
                assert state_of_torch() == (True, False, True, False)
                with profile(activities=[ProfilerActivity.CPU]) as found:
                    F.scaled_dot_product_attention(q, q, q, is_causal=True)
                assert "aten::_scaled_dot_product_attention_math" in {event.key for event in found.key_averages()}
                raise KeyError
            assert state_of_torch() == before
    finally:
        torch.use_deterministic_algorithms(False)
        filling.fill_uninitialized_memory = True


def test_deterministic_kernels_on_a_gpu_need_buffers_with_which_cublas_is_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found in ("", ":0:0", ":4096:2:16:8"):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", found)
        with pytest.raises(ValueError, match=rf"needs CUBLAS_WORKSPACE_CONFIG :4096:8 or :16:8.*found '{found}'"):
            kernels.deterministic(nullcontext, GPU)
        kernels.deterministic(nullcontext, CPU)
    for name, value in train.DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    kernels.deterministic(nullcontext, GPU)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_whole_step_computes_with_deterministic_kernels_if_they_are_wanted(tiny: Path, wanted: bool) -> None:
    settings = sources.from_file(tiny)
    options = replace(settings.train, deterministic=wanted, activation_checkpointing=True)
    engine = Engine(plan.make(replace(settings, train=options), 1), Ranks(ALONE, CPU, None))
    seen: set[object] = set()

    def note(*_: object) -> None:
        seen.add(state_of_torch()[0])

    engine.model.gpt.blocks[0].register_forward_hook(note)
    engine.model.gpt.blocks[0].register_full_backward_hook(note)
    engine.optimizer.register_step_pre_hook(note)
    engine.warm_up()
    engine.launch(0, 0)
    assert seen == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()


WAYS: tuple[Literal["auto", "on", "off"], ...] = ("auto", "on", "off")


def test_a_model_is_compiled_on_gpus_unless_refused_and_on_cpus_on_request() -> None:
    assert [kernels.compiles(wanted, CPU, ()) for wanted in WAYS] == [False, True, False]
    assert [kernels.compiles(wanted, GPU, ()) for wanted in WAYS] == [True, True, False]


def test_where_a_rank_lacks_something_for_it_no_model_is_compiled() -> None:
    assert [kernels.compiles(wanted, GPU, {"Python.h"}) for wanted in ("auto", "off")] == [False, False]
    with pytest.raises(ValueError, match=r"train\.compile on needs Python\.h and triton: install it, or use off"):
        kernels.compiles("on", GPU, {"triton", "Python.h"})


def test_the_compiler_needs_a_c_compiler_and_the_headers_of_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whether triton is installed depends on the build of torch."""

    lacks = kernels.lacks_to_compile.__wrapped__  # without its cache
    for variable in ("CC", "CXX", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
    headers = "Python.h (of python3-dev or python3-devel)"
    assert lacks("cpu") == {"a C++ compiler", headers}
    assert lacks("cuda") == {"triton", "a C compiler", headers}
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(kernels, "find_spec", lambda _: object())
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    assert lacks("cpu") == {"a C++ compiler"}
    assert lacks("cuda") == set()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: "/nowhere")
    monkeypatch.setenv("CPATH", f"/nowhere:{tmp_path}")
    monkeypatch.setenv("CXX", str(tmp_path / "gcc"))
    assert lacks("cpu") == set()
