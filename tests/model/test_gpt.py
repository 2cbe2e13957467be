"""hpcgpt.model.gpt: GPT-2 as published, to the last parameter and the tenth digit; and what holds for every kind."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcgpt.config.options import Config, Data, Model, Optim, Train
from hpcgpt.model.attention_context import causal_context
from hpcgpt.model.gpt import GPT, ForwardOptions

SMALL = Model(n_layer=3, n_head=4, n_embd=48, block_size=24, vocab_size=100)
MODERN = replace(SMALL, kind="modern", n_kv_head=2, qkv_bias=False)
KINDS = pytest.mark.parametrize("kind", [SMALL, MODERN], ids=["gpt2", "modern"])


def small(seed: int = 0, shape: Model = SMALL, **changes: Any) -> GPT:
    """Return a model in float64 in which every parameter, also biases and gains, differs from its neutral value."""
    model = GPT(replace(shape, **changes), seed).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def ids(batch: int = 2, length: int = 24, vocab_size: int = 100, seed: int = 5) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# --- size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tied", "qkv_bias", "expected"),
    [(False, False, 163_009_536), (True, False, 124_412_160), (True, True, 124_439_808)],
)
def test_gpt2_small_has_the_published_number_of_parameters(tied: bool, qkv_bias: bool, expected: int) -> None:
    with torch.device("meta"):
        model = GPT(Model(vocab_size=50257, block_size=1024, tied=tied, qkv_bias=qkv_bias))
    assert model.parameter_count() == expected
    padding = (50304 - 50257) * 768 * (1 if tied else 2)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected + padding


@pytest.mark.parametrize(("vocab_size", "rows"), [(1, 64), (63, 64), (64, 64), (65, 128), (100, 128), (50257, 50304)])
def test_the_embedding_has_a_multiple_of_64_rows_and_the_logits_only_the_vocabulary(vocab_size: int, rows: int) -> None:
    model = GPT(Model(n_layer=1, n_head=1, n_embd=2, block_size=4, vocab_size=vocab_size, tied=False))
    assert model.token_embedding.weight.shape == model.head.weight.shape == (rows, 2)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, vocab_size)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_per_matrix_weight_and_twelve_per_attention_entry(tied: bool) -> None:
    """An embedding of its own is only looked up in, so an untied head costs nothing more."""
    with torch.device("meta"):
        model = GPT(Model(vocab_size=50257, tied=tied))
    assert model.flops_per_token() == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_the_forward_options_come_from_the_configuration() -> None:
    assert ForwardOptions.from_config(Config(), end_of_text=7) == ForwardOptions(attention="auto")
    train = Train(loss_chunk=64, attention="math", activation_checkpointing=True)
    config = Config(data=Data(document_mask=True), train=train, optim=Optim(z_loss=0.25))
    assert ForwardOptions.from_config(config, end_of_text=7) == ForwardOptions(
        7, 64, 0.25, recompute=True, attention="math"
    )


# --- padding of the vocabulary ---------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_padding_ids_have_no_probability_and_their_rows_no_gradient(tied: bool) -> None:
    model = small(tied=tied)
    with torch.no_grad():
        model.head.weight[100:] = 1e3  # rows that would always have the largest logits without the mask
    x = ids()
    assert torch.equal(
        model.padded_logits(model.hidden(x)).softmax(dim=-1)[..., 100:], torch.zeros(2, 24, 28, dtype=torch.float64)
    )
    model(x, x.roll(-1, dims=1)).backward()
    for table in {model.head.weight, model.token_embedding.weight}:
        assert table.grad is not None
        assert torch.equal(table.grad[100:], torch.zeros(28, 48, dtype=torch.float64))
        assert (table.grad[:100] != 0).any()


def test_padding_does_not_change_the_loss() -> None:
    model, x, y = small(), ids(), ids(seed=6)
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert (model(x, y) - expected).abs() < 1e-14


def test_a_vocabulary_that_needs_no_padding_works_too() -> None:
    model, x = small(vocab_size=128), ids(vocab_size=128)
    expected = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
    assert (model(x, x) - expected).abs() < 1e-14


# --- the computation -------------------------------------------------------------------------------


def assert_same_loss(our_model: GPT, hf_model: Any) -> None:
    """Compare logits and loss with those of Hugging Face's model; compute the gradients of both."""
    x, y = ids(batch=3), ids(batch=3, seed=6)
    expected = hf_model(x).logits
    assert (our_model(x) - expected).abs().max() < 1e-10
    assert expected.std() > 0.5, "the logits hardly differ, so the comparison proves nothing"
    loss, reference = our_model(x, y), F.cross_entropy(expected.flatten(0, 1), y.flatten())
    assert (loss - reference).abs() < 1e-10
    loss.backward()
    reference.backward()  # type: ignore[no-untyped-call]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_weights_give_the_logits_loss_and_gradients_of_hugging_faces_gpt2(tied: bool) -> None:
    our_model, hf_model = small(tied=tied), hugging_face(tied)
    copy_weights(our_model, hf_model)
    assert_same_loss(our_model, hf_model)
    seen = 0
    for our_parameter, hf_parameter, transposed in pairs(our_model, hf_model):
        assert our_parameter.grad is not None
        gradient = (
            our_parameter.grad[: len(hf_parameter)]
            if our_parameter.dim() == 2 and not transposed
            else our_parameter.grad
        )
        gradient = gradient.T if transposed else gradient
        assert (gradient - hf_parameter.grad).abs().max() < 1e-10
        assert hf_parameter.grad.abs().max() > 1e-6
        seen += 1
    assert seen == len(list(our_model.parameters()))


def hugging_face(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_positions=24, n_embd=48, n_layer=3, n_head=4, tie_word_embeddings=tied,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)  # fmt: skip
    return GPT2LMHeadModel(config).double().train()


def copy_weights(our_model: GPT, hf_model: Any) -> None:
    with torch.no_grad():
        for our_parameter, hf_parameter, transposed in pairs(our_model, hf_model):
            hf_parameter.copy_(our_parameter.T if transposed else our_parameter[: len(hf_parameter)])


def pairs(our_model: GPT, hf_model: Any) -> list[tuple[Tensor, Any, bool]]:
    """Return our parameters, Hugging Face's, and whether its one is the transpose (Conv1D has inputs first)."""
    body = hf_model.transformer
    assert our_model.position_embedding is not None
    found = [
        (our_model.token_embedding.weight, body.wte.weight, False),
        (our_model.position_embedding.weight, body.wpe.weight, False),
        (our_model.norm.weight, body.ln_f.weight, False),
        (our_model.norm.bias, body.ln_f.bias, False),
    ]
    if not our_model.config.tied:
        found.append((our_model.head.weight, hf_model.lm_head.weight, False))
    for our_parameter, hf_parameter in zip(our_model.blocks, body.h, strict=True):
        block: Any = our_parameter
        found += [
            (block.attention_norm.weight, hf_parameter.ln_1.weight, False),
            (block.mlp_norm.weight, hf_parameter.ln_2.weight, False),
        ]
        found += [
            (block.attention_norm.bias, hf_parameter.ln_1.bias, False),
            (block.mlp_norm.bias, hf_parameter.ln_2.bias, False),
        ]
        for linear, conv in [
            (block.attention.qkv, hf_parameter.attn.c_attn),
            (block.attention.residual, hf_parameter.attn.c_proj),
            (block.mlp.up, hf_parameter.mlp.c_fc),
            (block.mlp.residual, hf_parameter.mlp.c_proj),
        ]:
            found += [(linear.weight, conv.weight, True), (linear.bias, conv.bias, False)]
    return found


@pytest.mark.parametrize(("changed", "least"), [({"gelu": "exact"}, 1e-5), ({"norm_eps": 0.01}, 1e-3)])
def test_the_form_of_gelu_and_the_epsilon_of_norms_are_those_that_were_asked_for(
    changed: dict[str, Any], least: float
) -> None:
    model, other = small(), small(**changed)
    assert (model(ids()) - other(ids())).abs().max() > least
    block: Any = other.blocks[0]
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centred = x - x.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + changed.get("norm_eps", 1e-5)).sqrt()
    norm = block.mlp_norm
    assert (norm(x) - expected * norm.weight - norm.bias).abs().max() < 1e-12
    hidden = block.mlp.up(x)
    curved = (
        hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 if "gelu" in changed else F.gelu(hidden, approximate="tanh")
    )
    assert (block.mlp(x) - block.mlp.residual(curved)).abs().max() < 1e-12


def test_without_qkv_bias_the_model_equals_one_with_zero_biases() -> None:
    with_bias, without = small(), small(qkv_bias=False)
    for block in with_bias.blocks:
        torch.nn.init.zeros_(block.attention.qkv.bias)  # type: ignore[arg-type, union-attr]
    without.load_state_dict({k: v for k, v in with_bias.state_dict().items() if not k.endswith("qkv.bias")})
    assert torch.equal(without(ids()), with_bias(ids()))


def test_a_tied_head_is_the_embedding_itself() -> None:
    tied, untied = small(tied=True), small(tied=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert not torch.equal(untied.head.weight, untied.token_embedding.weight)


@KINDS
@pytest.mark.parametrize("position", [1, 11, 23])
def test_a_token_changes_only_its_own_and_later_logits(kind: Model, position: int) -> None:
    model, x = small(shape=kind), ids()
    changed = x.clone()
    changed[:, position] = (changed[:, position] + 1) % 100
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(dim=-1).all()


def test_a_shorter_context_gives_the_same_logits() -> None:
    model, x = small(), ids()
    assert (model(x)[:, :7] - model(x[:, :7])).abs().max() < 1e-12


@KINDS
def test_bfloat16_autocast_is_close_to_float32_and_sums_the_loss_in_float32(kind: Model) -> None:
    model = GPT(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids(), ids())
    loss.backward()
    assert loss.dtype == torch.float32
    assert (loss - model(ids(), ids())).abs() < 0.05


# --- initialization --------------------------------------------------------------------------------


def test_only_the_seed_determines_the_initial_weights() -> None:
    torch.manual_seed(1)
    first = GPT(SMALL, seed=3).state_dict()
    torch.manual_seed(2)
    second, other = GPT(SMALL, seed=3).state_dict(), GPT(SMALL, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@KINDS
def test_residual_projections_are_initialized_smaller_by_the_root_of_twice_the_layers(kind: Model) -> None:
    model = GPT(replace(kind, n_layer=8, n_embd=256, block_size=256, vocab_size=1000, tied=False), seed=1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
            continue
        expected = 0.02 / math.sqrt(16) if name.endswith("residual.weight") else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * expected, name


@KINDS
def test_the_first_loss_is_that_of_a_uniform_guess(kind: Model) -> None:
    model = GPT(replace(kind, vocab_size=1000))
    loss = model(ids(8, vocab_size=1000), ids(8, vocab_size=1000, seed=6))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.01)


@KINDS
def test_dropout_acts_in_training_only(kind: Model) -> None:
    model, reference = small(shape=kind, dropout=0.5), small(shape=kind, dropout=0.0)
    assert torch.equal(model.eval()(ids()), reference(ids()))
    assert torch.equal(reference.train()(ids()), reference.eval()(ids()))
    model.train()
    torch.manual_seed(0)
    once, other = model(ids()), model(ids())
    torch.manual_seed(0)
    assert torch.equal(once, model(ids()))
    assert not torch.equal(once, other)


def test_dropout_acts_on_embeddings_attention_and_both_residual_branches() -> None:
    model = small(dropout=0.5, block_size=512)
    x = torch.randn(1, 512, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block: Any = model.blocks[0]
    assert dropped(model.dropout, x) == 0
    assert dropped(block.mlp, x) < 1e-12
    # Attention also drops its weights, so the outputs that are left are not merely scaled.
    context = causal_context(512, torch.zeros(1, 512))
    assert dropped(block.attention, x, context) > 0.1


def dropped(module: torch.nn.Module, *arguments: Any) -> Tensor:
    """Return how far the remaining outputs in training are from the doubled plain ones; half of them are zero."""
    torch.manual_seed(0)
    plain, noisy = module.eval()(*arguments), module.train()(*arguments)
    dropped_outputs = noisy == 0
    assert 0.45 < dropped_outputs.double().mean() < 0.55
    furthest: Tensor = (noisy - 2 * plain)[~dropped_outputs].abs().max()
    return furthest
