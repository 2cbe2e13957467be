"""hpcgpt.model.block_modern: RMSNorm, rotary positions, SwiGLU, QK-norm and grouped queries, as in Qwen3."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.model.attention_context import rope_cos_sin, slowed_down
from hpcgpt.model.block_modern import Norm, apply_rope
from hpcgpt.model.gpt import GPT
from hpcgpt.model.kv_cache import KVCache
from tests.model.test_gpt import MODERN, assert_same_loss, ids, small

# Heads that are not n_embd / n_head wide, and nothing at its default.
RELEASED = replace(MODERN, head_size=20, mlp_width=80, qkv_bias=True, qk_norm=False, norm_eps=1e-3, rope_base=500.0,
                   rope_factor=8.0, rope_context=12)  # fmt: skip
HEADS_OF_16 = Model(kind="modern", head_size=16)
HEADS_OF_8 = Model(kind="modern", head_size=8)

# --- the computation -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "groups"), [(True, 4), (False, 2), (True, 1)])
def test_the_same_weights_give_the_logits_loss_and_gradients_of_hugging_faces_qwen3(
    tied: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    # Hugging Face's computes in float32, whatever the dtype of the model.
    monkeypatch.setattr(
        Qwen3RMSNorm, "forward", lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    )
    our_model, hf_model = small(shape=MODERN, tied=tied, n_kv_head=groups), hugging_face(tied, groups)
    copy_weights(our_model, hf_model)
    assert_same_loss(our_model, hf_model)
    compared = pairs(our_model, hf_model)
    for our_parameter, hf_parameters in compared:
        assert our_parameter.grad is not None
        split = zip(
            torch.split(our_parameter.grad, [len(part) for part in hf_parameters])
            if len(hf_parameters) > 1
            else [our_parameter.grad],
            hf_parameters,
            strict=True,
        )
        for gradient, part in split:
            assert (gradient[: len(part)] - part.grad).abs().max() < 1e-10
            assert part.grad.abs().max() > 1e-6
    assert len(compared) == len(list(our_model.parameters()))


def hugging_face(tied: bool, groups: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options: dict[str, Any] = {"rope_theta": 10_000.0}  # newer versions do not declare it
    config = Qwen3Config(vocab_size=100, hidden_size=48, intermediate_size=128, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=groups, head_dim=12, rms_norm_eps=1e-6,
                         max_position_embeddings=24, tie_word_embeddings=tied,
                         attention_dropout=0.0, use_cache=False, **options)  # fmt: skip
    return Qwen3ForCausalLM(config).double().train()


def copy_weights(our_model: GPT, hf_model: Any) -> None:
    with torch.no_grad():
        for our_parameter, hf_parameters in pairs(our_model, hf_model):
            for part, target in zip(
                torch.split(our_parameter, [len(p) for p in hf_parameters])
                if len(hf_parameters) > 1
                else [our_parameter],
                hf_parameters,
                strict=True,
            ):
                target.copy_(part[: len(target)])


def pairs(our_model: GPT, hf_model: Any) -> list[tuple[Tensor, list[Any]]]:
    """Return each of our parameters with Hugging Face's parameters for its rows."""
    body = hf_model.model
    found = [
        (our_model.token_embedding.weight, [body.embed_tokens.weight]),
        (our_model.norm.weight, [body.norm.weight]),
    ]
    if not our_model.config.tied:
        found.append((our_model.head.weight, [hf_model.lm_head.weight]))
    for our_parameter, hf_parameters in zip(our_model.blocks, body.layers, strict=True):
        block: Any = our_parameter
        attention = hf_parameters.self_attn
        found += [
            (block.attention_norm.weight, [hf_parameters.input_layernorm.weight]),
            (block.mlp_norm.weight, [hf_parameters.post_attention_layernorm.weight]),
            (block.attention.qkv.weight, [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            (block.attention.query_norm.weight, [attention.q_norm.weight]),
            (block.attention.key_norm.weight, [attention.k_norm.weight]),
            (block.attention.residual.weight, [attention.o_proj.weight]),
            (block.mlp.gate_and_up.weight, [hf_parameters.mlp.gate_proj.weight, hf_parameters.mlp.up_proj.weight]),
            (block.mlp.residual.weight, [hf_parameters.mlp.down_proj.weight]),
        ]
    return found


def test_attention_scores_depend_only_on_the_distance_of_positions() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()

    def score(here: int, there: int) -> float:
        query, key = (
            apply_rope(q, rope_cos_sin(torch.tensor([here]), HEADS_OF_16)),
            apply_rope(k, rope_cos_sin(torch.tensor([there]), HEADS_OF_16)),
        )
        return (query * key).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rotation_angles_are_the_position_over_powers_of_the_base() -> None:
    cosine, sine = rope_cos_sin(torch.tensor([0, 1, 7]), HEADS_OF_8)
    for row, position in enumerate((0, 1, 7)):
        angles = [position / 10_000 ** (2 * pair / 8) for pair in range(4)]
        assert cosine[row].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
        assert sine[row].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)


@pytest.mark.slow
def test_slow_rotations_are_those_of_llama_3() -> None:
    """Bit for bit: an error of a frequency grows with the position."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    options: dict[str, Any] = {"rope_scaling": scaling, "rope_theta": 5e5}  # newer versions do not declare them
    theirs = LlamaConfig(hidden_size=4096, num_attention_heads=32, **options)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, torch.device("cpu"))
    assert factor == 1
    config = Model(kind="modern", n_embd=4096, n_head=32, rope_base=5e5, rope_factor=8.0)
    plain = 1.0 / 5e5 ** (torch.arange(0, 128, 2, dtype=torch.float32) / 128)
    assert torch.equal(slowed_down(plain, config), expected)
    kinds = {"kept" if new == old else "slowed" if new == old / 8 else "between"
             for new, old in zip(expected, plain, strict=True)}  # fmt: skip
    assert kinds == {"kept", "slowed", "between"}


def test_every_option_of_the_block_changes_what_it_computes_and_the_kv_cache_follows() -> None:
    model = small(shape=RELEASED).eval()
    expected, cache = model(ids()), KVCache(RELEASED, 24)
    for position in range(24):
        found = model(ids()[:, position : position + 1], cache=cache)
        assert (found[:, 0] - expected[:, position]).abs().max() < 1e-10
    for key in ("norm_eps", "rope_base", "rope_factor", "rope_context"):
        other = small(shape=replace(RELEASED, **{key: getattr(MODERN, key)})).eval()
        other.load_state_dict(model.state_dict())
        assert (other(ids()) - expected).abs().max() > 1e-4, key
    shapes = {name: tuple(parameter.shape) for name, parameter in model.blocks[0].named_parameters()}
    assert shapes == {
        "attention_norm.weight": (48,), "mlp_norm.weight": (48,), "attention.qkv.weight": (8 * 20, 48),
        "attention.qkv.bias": (8 * 20,), "attention.residual.weight": (48, 4 * 20), "mlp.gate_and_up.weight": (160, 48),
        "mlp.residual.weight": (48, 80),
    }  # fmt: skip


def test_in_bfloat16_angles_stay_exact_and_only_the_result_is_rounded() -> None:
    x = torch.randn(1, 2, 600, 16, generator=torch.Generator().manual_seed(1))
    by = rope_cos_sin(torch.arange(600), HEADS_OF_16)
    assert torch.equal(apply_rope(x.bfloat16(), by), apply_rope(x.bfloat16().float(), by).bfloat16())


def test_the_norm_divides_by_the_root_mean_square_and_multiplies_by_its_gains() -> None:
    norm, x = Norm(8, 1e-6).double(), torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8))
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * torch.arange(8)
    assert (norm(100 * x) - expected).abs().max() < 1e-4
    assert (norm(x) - expected).abs().max() < 1e-12


# --- size, defaults --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "tied", "expected"),
    [
        # 50257 x 768 + 12 x (768 x 64 x (12 + 2 K) + 768 x 768 + 3 x 768 x 2048 + 2 x 768 + 2 x 64) + 768
        (12, True, 123_552_768),
        (4, True, 114_115_584),
        (4, False, 152_712_960),
    ],
)
def test_the_parameter_count_is_that_of_the_matrices_and_gains(groups: int, tied: bool, expected: int) -> None:
    shape = Model(kind="modern", vocab_size=50257, n_kv_head=groups, tied=tied, qkv_bias=False)
    with torch.device("meta"):
        model = GPT(shape)
    assert model.parameter_count() == expected
    only_looked_up = 50257 * 768 * (not tied)  # an untied embedding is no matrix product
    assert model.flops_per_token() == 6 * (expected - only_looked_up) + 12 * 12 * 768 * 1024


def test_n_kv_head_0_means_one_for_each_head() -> None:
    first, same = GPT(Model(**vars(MODERN) | {"n_kv_head": 0})), GPT(Model(**vars(MODERN) | {"n_kv_head": 4}))
    assert torch.equal(first(ids()), same(ids()))


def test_modern_has_neither_biases_nor_a_position_embedding() -> None:
    names = [name for name, _ in GPT(MODERN).named_parameters()]
    assert not [name for name in names if name.endswith("bias") or "position" in name]
