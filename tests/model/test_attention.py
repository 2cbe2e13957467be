"""hpcgpt.model.attention: documents packed into one window are computed as if each were alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.profiler import ProfilerActivity, profile

from hpcgpt.config.options import Config, Model
from hpcgpt.model import attention, attention_context, kernels
from hpcgpt.model.attention_context import AttentionContext
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.kernels import Attention
from hpcgpt.model.precision import computing_in
from tests.model.test_gpt import KINDS

START = 99  # the id that begins a document


def masked(kind: Model, options: ForwardOptions | None = None, **changes: Any) -> GPT:
    model = GPT(Model(**vars(kind) | changes), 0, options or ForwardOptions(document_start=START)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def document(length: int, seed: int) -> Tensor:
    """Return a document: its first token is START, and no other one is."""
    rest = torch.randint(0, START, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return torch.cat((torch.tensor([START]), rest))


def pairs(text: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and targets (1, T)."""
    return text[None, :-1], text[None, 1:]


@KINDS
@pytest.mark.parametrize("options", [{}, {"loss_chunk": 5}, {"recompute": True}], ids=str)
def test_packed_documents_have_the_loss_and_gradients_of_separate_ones(kind: Model, options: dict[str, Any]) -> None:
    first, second = document(13, seed=1), document(9, seed=2)
    # The first token of the second document is the target of the first document's last token.
    alone = [torch.cat((first, second[:1])), second]
    model = masked(kind, ForwardOptions(START, **options))
    packed = model(*pairs(torch.cat((first, second))))
    packed.backward()
    gradients = [gradient_of(parameter).clone() for parameter in model.parameters()]
    model.zero_grad()
    apart = sum(model(*pairs(text)) * (len(text) - 1) for text in alone) / 21
    apart.backward()
    assert abs(packed - apart) < 1e-10
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - gradient_of(parameter)).abs().max() < 1e-10

    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    assert abs(plain(*pairs(torch.cat((first, second)))) - apart) > 1e-3, (
        "without the mask the result is the same, so this proves nothing"
    )


@KINDS
def test_a_window_that_begins_within_a_document_has_positions_from_0(kind: Model) -> None:
    tail, second = document(9, seed=1)[1:], document(7, seed=2)
    model = masked(kind)
    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    logits = model(torch.cat((tail, second))[None])
    assert (logits[:, :8] - plain(tail[None])).abs().max() < 1e-12
    assert (logits[:, 8:] - plain(second[None])).abs().max() < 1e-12


@KINDS
def test_each_row_has_its_own_document_borders_also_in_evaluation(kind: Model) -> None:
    rows = torch.stack([torch.cat((document(5, 1), document(15, 2))), torch.cat((document(12, 3), document(8, 4)))])
    model = masked(kind, dropout=0.3).eval()
    together = model(rows)
    for row, length in ((0, 5), (1, 12)):
        alone = torch.cat((model(rows[row : row + 1, :length]), model(rows[row : row + 1, length:])), dim=1)
        assert (together[row] - alone[0]).abs().max() < 1e-12


@KINDS
def test_a_window_of_one_document_is_computed_as_without_a_mask(kind: Model) -> None:
    model, text = masked(kind), document(20, seed=1)[None]
    plain = GPT(model.config).double()
    plain.load_state_dict(model.state_dict())
    assert (model(text) - plain(text)).abs().max() < 1e-12


def test_each_start_token_begins_a_document_at_position_0() -> None:
    documents, positions = attention_context.document_positions(
        torch.tensor([[5, 5, 9, 5, 9, 9, 5], [9, 1, 1, 1, 1, 1, 9]]), 9
    )
    assert documents.tolist() == [[0, 0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2]]
    assert positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@KINDS
def test_flex_attention_equals_naive_attention_with_the_mask(kind: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pass, which also runs on CPUs: the library computes it without compilation, in blocks."""
    model = masked(kind, block_size=300).float().eval()
    rows = torch.stack([torch.cat((document(140, 1), document(160, 2))), torch.cat((document(7, 3), document(293, 4)))])
    with torch.no_grad():
        expected = model(rows)
        monkeypatch.setattr(attention_context, "supports_flex", lambda *_: True)
        model.can_use_flex = False
        assert isinstance(model._attention_context(rows, 300).mask, Tensor), "without a compiler"
        model.can_use_flex = True
        monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
        context = model._attention_context(rows, 300)
        assert isinstance(context.mask, BlockMask)
        assert context.mask.kv_num_blocks.tolist() == [[[1, 2, 2]], [[1, 2, 3]]]
        found = model(rows)
    assert (found - expected).abs().max() < 1e-4


def test_flex_attention_is_for_gpus_without_dropout_and_up_to_32_bits() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert attention_context.supports_flex(gpu, torch.float32, 0.0)
    assert not attention_context.supports_flex(gpu, torch.float64, 0.0)
    assert not attention_context.supports_flex(gpu, torch.float32, 0.1)
    assert not attention_context.supports_flex(cpu, torch.float32, 0.0)


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd:DeprecationWarning")  # of the compiler, at a Function
@KINDS
@pytest.mark.parametrize(
    "options", [ForwardOptions(), ForwardOptions(START, 16, 1e-3, recompute=True)], ids=["plain", "all options"]
)
def test_torch_compile_makes_one_graph_of_the_forward_pass(kind: Model, options: ForwardOptions) -> None:
    """One graph also means that nothing in it waits for a number from the device.

    The compiler's last stage, which generates machine code, takes too long for a test: benchmarks/model.py runs it.
    """
    model = GPT(Model(**vars(kind) | {"n_layer": 1}), 0, options)
    torch._dynamo.reset()
    text = torch.cat((document(13, 1), document(12, 2)))[None]
    x, y = text[:, :-1], text[:, 1:]
    expected = model(x, y)
    expected.backward()
    gradients = [gradient_of(parameter).clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(x, y)
    loss.backward()
    assert (loss - expected).abs() < 1e-5
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert (gradient - gradient_of(parameter)).abs().max() < 1e-5


# --- naive attention -------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_naive_attention_equals_scaled_dot_product_attention(groups: int) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator).double() for heads in (4, groups, groups))
    parts = [part.requires_grad_() for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    made = attention.naive_attention(q, k, v, 0.0)
    assert (made - expected).abs().max() < 1e-12
    weights = torch.randn(expected.shape, generator=generator).double()
    for found_gradient, expected_gradient in zip(
        *(torch.autograd.grad((out * weights).sum(), parts) for out in (made, expected)), strict=True
    ):
        assert (found_gradient - expected_gradient).abs().max() < 1e-12


def test_dropout_zeroes_attention_weights_and_scales_the_others() -> None:
    q = torch.zeros(1, 1, 4000, 2)  # so all weights of a query are equal
    made = attention.naive_attention(q, q, torch.ones_like(q), 0.25)[0, 0, 1000:, 0]
    assert made.mean() == pytest.approx(1, abs=0.01)
    assert 0.01 < made.std() < 0.05


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_are_dropped_with_and_without_a_mask(masked: bool) -> None:
    q = torch.zeros(1, 1, 500, 2)  # so all weights of a query are equal
    context = AttentionContext(
        torch.arange(500), torch.ones(1, 1, 500, 500, dtype=torch.bool).tril() if masked else None
    )
    made = attention.attend(q, q, torch.ones_like(q), context, 0.25)[0, 0, 100:, 0]
    assert made.mean() == pytest.approx(1, abs=0.02)
    assert 0.01 < made.std() < 0.1


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize(
    ("dtype", "length", "kernel", "uses_flash"),
    [
        (torch.bfloat16, 32, "auto", False),
        (torch.bfloat16, 32, "flash", True),
        (torch.bfloat16, attention.NAIVE_UP_TO + 1, "auto", True),
        (torch.float32, 32, "auto", True),
    ],
)
def test_short_windows_in_bfloat16_use_naive_attention_unless_a_kernel_is_named(
    dtype: torch.dtype, length: int, kernel: Attention, uses_flash: bool
) -> None:
    settings = Config(model=Model(n_layer=1, n_head=2, n_embd=16, block_size=1024, vocab_size=100))
    settings = replace(settings, train=replace(settings.train, attention=kernel))
    model, ids = (
        GPT(settings.model, options=ForwardOptions.from_config(settings, START)),
        torch.zeros(1, length, dtype=torch.int64),
    )
    cpu = torch.device("cpu")
    with (
        profile(activities=[ProfilerActivity.CPU]) as found,
        computing_in(dtype, cpu),
        kernels.attention(kernel, cpu, dtype)(),
    ):
        model(ids, ids).backward()
    assert (FLASH in {event.key for event in found.key_averages()}) == uses_flash
