"""hpcgpt.model.loss, and recomputation: less memory, the same numbers; every gradient is the slope of the loss."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hpcgpt.config.options import Model
from hpcgpt.model.gpt import GPT, PLAIN, ForwardOptions
from hpcgpt.model.loss import mean_loss
from tests.model.test_attention import START, document
from tests.model.test_gpt import KINDS, MODERN, ids
from tests.model.test_gpt import SMALL as GPT2


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states (70, 16), targets, and a head of 96 rows, of which the bias excludes the last 6."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 16, dtype=dtype, generator=generator, requires_grad=True) for n in (70, 96))
    bias = torch.zeros(96, dtype=dtype)
    bias[90:] = -torch.inf
    return hidden, torch.randint(0, 90, (70,), generator=generator), weight, bias


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 32, 69])
def test_chunks_change_neither_the_loss_nor_a_gradient(chunk: int, z_loss: float) -> None:
    hidden, targets, weight, bias = head()
    unchunked = mean_loss(hidden, targets, weight, bias, z_loss=z_loss)
    expected = torch.autograd.grad(unchunked, (hidden, weight))
    parts = mean_loss(hidden, targets, weight, bias, chunk=chunk, z_loss=z_loss)
    assert (parts - unchunked).abs() < 1e-13
    for gradient, reference in zip(torch.autograd.grad(parts, (hidden, weight)), expected, strict=True):
        assert (gradient - reference).abs().max() < 1e-14
        assert reference.abs().max() > 1e-3


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_in_bfloat16_have_the_gradients_of_float32_but_for_rounding(dtype: torch.dtype, z_loss: float) -> None:
    hidden, targets, weight, bias = head(torch.float32)
    expected = torch.autograd.grad(mean_loss(hidden, targets, weight, bias, z_loss=z_loss) / 3, (hidden, weight))
    given = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        value = mean_loss(given[0], targets, given[1], bias, chunk=32, z_loss=z_loss) / 3
    for gradient, reference in zip(torch.autograd.grad(value, given), expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - reference).norm() < 0.01 * reference.norm()


def test_chunks_repeat_no_product_and_without_gradients_make_one_each() -> None:
    hidden, targets, weight, bias = head()
    product = 2 * weight.numel() * len(targets)  # FLOPs
    with FlopCounterMode(display=False) as training:
        mean_loss(hidden, targets, weight, bias, chunk=32).backward()  # type: ignore[no-untyped-call]
    assert training.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as evaluation, torch.no_grad():
        loss = mean_loss(hidden, targets, weight, bias, chunk=32)
    assert evaluation.get_total_flops() == product
    assert (loss - mean_loss(hidden, targets, weight, bias)).abs() < 1e-13


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    hidden, targets, weight, bias = head()
    logits = (hidden @ weight.T)[:, :90]
    expected = F.cross_entropy(logits, targets) + 0.1 * logits.exp().sum(dim=1).log().square().mean()
    assert (mean_loss(hidden, targets, weight, bias, z_loss=0.1) - expected).abs() < 1e-12


def test_without_z_loss_the_loss_is_the_plain_cross_entropy_bit_for_bit() -> None:
    hidden, targets, weight, bias = head(torch.float32)
    assert torch.equal(mean_loss(hidden, targets, weight, bias), F.cross_entropy(hidden @ weight.T + bias, targets))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [0, 32])
def test_the_loss_of_bfloat16_logits_is_computed_in_float32(chunk: int, z_loss: float) -> None:
    hidden, targets, weight, bias = head(torch.float32)
    hidden, weight = hidden.detach().bfloat16(), weight.detach().bfloat16()
    logits = F.linear(hidden, weight, bias.bfloat16())  # rounded to bfloat16
    expected = F.cross_entropy(logits.float(), targets) + z_loss * logits.float().logsumexp(dim=-1).square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_loss(hidden, targets, weight, bias, chunk=chunk, z_loss=z_loss)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@KINDS
def test_z_loss_is_added_in_training_only(kind: Model) -> None:
    plain, with_z = GPT(kind, 1).double(), GPT(kind, 1, ForwardOptions(z_loss=0.1)).double()
    x, y = ids(), ids(seed=6)
    added = 0.1 * plain(x).logsumexp(dim=-1).square().mean()
    assert (with_z(x, y) - plain(x, y) - added).abs() < 1e-12
    assert added > 1
    assert torch.equal(with_z.eval()(x, y), plain.eval()(x, y))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@KINDS
def test_with_chunks_no_tensor_is_as_large_as_the_logits(kind: Model) -> None:
    """Records everything that forward and backward pass allocate: 8 x 24 targets, 3,008 ids."""
    shape = Model(**vars(kind) | {"vocab_size": 3000})
    for chunk, expected in ((0, 8 * 24 * 3008), (16, 3008 * 48)):  # then the head's gradient is the largest
        model, x = GPT(shape, 1, ForwardOptions(loss_chunk=chunk)), ids(8)
        with Largest() as largest:
            model(x, x).backward()
        assert largest.elements == expected


def saved_bytes(model: GPT) -> int:
    """Return what the forward pass of 4 x 24 tokens saves for the backward pass, each storage once, without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(tensor)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids(4), ids(4))
    return sum(kept.values())


@KINDS
def test_with_chunks_the_heads_gradient_is_saved_instead_of_logits(kind: Model) -> None:
    shape = Model(**vars(kind) | {"vocab_size": 3000})
    unchunked, chunked = (saved_bytes(GPT(shape, 1, ForwardOptions(loss_chunk=chunk))) for chunk in (0, 16))
    logits, gradient = 4 * 24 * 3008 * 4, 3008 * 48 * 4
    assert unchunked - chunked == pytest.approx(logits - gradient, rel=0.01)


@KINDS
def test_recomputation_saves_only_the_inputs_of_each_block(kind: Model) -> None:
    def of_a_block(options: ForwardOptions) -> int:
        small, large = (GPT(Model(**vars(kind) | {"n_layer": n}), 1, options) for n in (2, 6))
        return (saved_bytes(large) - saved_bytes(small)) // 4

    inputs = 4 * 24 * 48 * 4  # bytes of the inputs of a block
    assert of_a_block(ForwardOptions(recompute=True)) == inputs
    assert of_a_block(PLAIN) > 10 * inputs


@KINDS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_bits_also_with_dropout(kind: Model, dropout: float) -> None:
    found = []
    for recompute in (False, True):
        model = GPT(Model(**vars(kind) | {"dropout": dropout}), 1, ForwardOptions(recompute=recompute))
        torch.manual_seed(3)
        loss = model(ids(), ids(seed=6))
        loss.backward()
        found.append([loss, torch.rand(1), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- gradients -------------------------------------------------------------------------------------

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 10, "vocab_size": 100}


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        ForwardOptions(START),
        ForwardOptions(loss_chunk=4),
        ForwardOptions(z_loss=0.1),
        ForwardOptions(START, 4, 0.1, recompute=True),
    ],
    ids=["plain", "document mask", "chunks", "z-loss", "all at once"],
)
def test_gradients_are_the_slopes_of_the_loss(kind: Model, options: ForwardOptions) -> None:
    """By central differences in float64: for each parameter the two entries of largest gradient and two others."""
    grouped = {"n_kv_head": 1} if kind.kind == "modern" else {}
    model = GPT(Model(**vars(kind) | TINY | grouped), 1, options).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    text = torch.cat((document(6, 1), document(5, 2)))
    x, y = torch.stack((text[:-1], text[1:].flip(0))), torch.stack((text[1:], text[:-1].flip(0)))
    model(x, y).backward()
    step = 1e-5
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        slopes, values = parameter.grad.flatten(), parameter.data.flatten()
        assert values.data_ptr() == parameter.data_ptr()
        entries = {
            *slopes.abs().topk(2).indices.tolist(),
            *torch.randint(0, len(slopes), (2,), generator=generator).tolist(),
        }
        for entry in entries:
            before = values[entry].item()
            with torch.no_grad():
                values[entry] = before + step
                above = model(x, y)
                values[entry] = before - step
                below = model(x, y)
                values[entry] = before
            measured = ((above - below) / (2 * step)).item()
            assert slopes[entry].item() == pytest.approx(measured, rel=1e-6, abs=1e-8), (name, entry)
        assert slopes.abs().max() > 1e-4, f"{name}: the gradient is too small for a meaningful comparison"


def test_every_combination_of_options_gives_the_same_loss_on_one_document() -> None:
    x, y = document(24, 1)[None], ids(1)
    for kind in (GPT2, MODERN):
        expected = GPT(kind, 1).double()(x, y)
        for start, chunk, recompute in itertools.product((None, START), (0, 5), (False, True)):
            found = GPT(kind, 1, ForwardOptions(start, chunk, recompute=recompute)).double()(x, y)
            assert (found - expected).abs() < 1e-12
