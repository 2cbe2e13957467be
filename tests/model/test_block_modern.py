"""hpcgpt.model.block_modern: RMSNorm, rotary positions, SwiGLU, QK-norm and grouped queries, as Qwen3 has them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.model.attention_context import rope_cos_sin
from hpcgpt.model.block_modern import Norm, apply_rope
from hpcgpt.model.gpt import GPT
from tests.model.test_gpt import MODERN, ids, small

# --- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "groups"), [(True, 4), (False, 2), (True, 1)])
def test_the_same_weights_give_the_logits_loss_and_gradients_of_hugging_faces_qwen3(
    tied: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    # Theirs goes through float32, whatever the model is in.
    monkeypatch.setattr(
        Qwen3RMSNorm, "forward", lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    )
    ours, theirs = small(shape=MODERN, tied=tied, n_kv_head=groups), hugging_face(tied, groups)
    copy_weights(ours, theirs)
    x, y = ids(batch=3), ids(batch=3, seed=6)
    expected = theirs(x).logits
    assert (ours(x) - expected).abs().max() < 1e-10
    assert expected.std() > 0.5, "the logits hardly differ, so the comparison would show nothing"

    loss, reference = ours(x, y), F.cross_entropy(expected.flatten(0, 1), y.flatten())
    assert (loss - reference).abs() < 1e-10
    loss.backward()
    reference.backward()  # type: ignore[no-untyped-call]
    compared = pairs(ours, theirs)
    for mine, his in compared:
        assert mine.grad is not None
        split = zip(
            torch.split(mine.grad, [len(part) for part in his]) if len(his) > 1 else [mine.grad], his, strict=True
        )
        for gradient, part in split:
            assert (gradient[: len(part)] - part.grad).abs().max() < 1e-10
            assert part.grad.abs().max() > 1e-6
    assert len(compared) == len(list(ours.parameters()))


def hugging_face(tied: bool, groups: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    options: dict[str, Any] = {"rope_theta": 10_000.0}  # newer versions do not declare it
    config = Qwen3Config(vocab_size=100, hidden_size=48, intermediate_size=128, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=groups, head_dim=12, rms_norm_eps=1e-6,
                         max_position_embeddings=24, tie_word_embeddings=tied,
                         attention_dropout=0.0, use_cache=False, **options)  # fmt: skip
    return Qwen3ForCausalLM(config).double().train()


def copy_weights(ours: GPT, theirs: Any) -> None:
    with torch.no_grad():
        for mine, his in pairs(ours, theirs):
            for part, target in zip(
                torch.split(mine, [len(p) for p in his]) if len(his) > 1 else [mine], his, strict=True
            ):
                target.copy_(part[: len(target)])


def pairs(ours: GPT, theirs: Any) -> list[tuple[Tensor, list[Any]]]:
    """Our parameters, and theirs that stand for the rows of it."""
    body = theirs.model
    found = [(ours.token_embedding.weight, [body.embed_tokens.weight]), (ours.norm.weight, [body.norm.weight])]
    if not ours.config.tied:
        found.append((ours.head.weight, [theirs.lm_head.weight]))
    for mine, his in zip(ours.blocks, body.layers, strict=True):
        block: Any = mine
        attention = his.self_attn
        found += [
            (block.attention_norm.weight, [his.input_layernorm.weight]),
            (block.mlp_norm.weight, [his.post_attention_layernorm.weight]),
            (block.attention.qkv.weight, [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]),
            (block.attention.query_norm.weight, [attention.q_norm.weight]),
            (block.attention.key_norm.weight, [attention.k_norm.weight]),
            (block.attention.residual.weight, [attention.o_proj.weight]),
            (block.mlp.gate_and_up.weight, [his.mlp.gate_proj.weight, his.mlp.up_proj.weight]),
            (block.mlp.residual.weight, [his.mlp.down_proj.weight]),
        ]
    return found


def test_what_heads_see_of_each_other_depends_on_their_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()

    def score(here: int, there: int) -> float:
        query, key = (
            apply_rope(q, rope_cos_sin(torch.tensor([here]), 16)),
            apply_rope(k, rope_cos_sin(torch.tensor([there]), 16)),
        )
        return (query * key).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_pairs_turn_by_the_position_over_powers_of_the_base() -> None:
    cosine, sine = rope_cos_sin(torch.tensor([0, 1, 7]), 8)
    for row, position in enumerate((0, 1, 7)):
        angles = [position / 10_000 ** (2 * pair / 8) for pair in range(4)]
        assert cosine[row].tolist() == pytest.approx([math.cos(angle) for angle in angles], abs=1e-6)
        assert sine[row].tolist() == pytest.approx([math.sin(angle) for angle in angles], abs=1e-6)


def test_in_bfloat16_angles_are_not_rounded_and_the_result_is_once() -> None:
    x, by = torch.randn(1, 2, 600, 16, generator=torch.Generator().manual_seed(1)), rope_cos_sin(torch.arange(600), 16)
    assert torch.equal(apply_rope(x.bfloat16(), by), apply_rope(x.bfloat16().float(), by).bfloat16())


def test_the_norm_makes_the_root_mean_square_one_and_then_applies_its_gains() -> None:
    norm, x = Norm(8).double(), torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8))
    expected = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * torch.arange(8)
    assert (norm(100 * x) - expected).abs().max() < 1e-4
    assert (norm(x) - expected).abs().max() < 1e-12


# --- its size and its start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "tied", "expected"),
    [
        # 50257 x 768 + 12 x (768 x 64 x (12 + 2 K) + 768 x 768 + 3 x 768 x 2048 + 2 x 768 + 2 x 64) + 768
        (12, True, 123_552_768),
        (4, True, 114_115_584),
        (4, False, 152_712_960),
    ],
)
def test_its_parameters_are_those_of_the_matrices_and_gains(groups: int, tied: bool, expected: int) -> None:
    shape = Model(kind="modern", vocab_size=50257, n_kv_head=groups, tied=tied)
    with torch.device("meta"):
        model = GPT(shape)
    assert model.parameter_count() == expected
    used_twice = 50257 * 768 * (not tied)  # a token table that is no head multiplies nothing
    assert model.flops_per_token() == 6 * (expected - used_twice) + 12 * 12 * 768 * 1024


def test_no_number_of_key_value_heads_means_one_for_each_head() -> None:
    first, same = GPT(Model(**vars(MODERN) | {"n_kv_head": 0})), GPT(Model(**vars(MODERN) | {"n_kv_head": 4}))
    assert torch.equal(first(ids()), same(ids()))


def test_it_has_neither_biases_nor_a_table_of_positions() -> None:
    names = [name for name, _ in GPT(MODERN).named_parameters()]
    assert not [name for name in names if name.endswith("bias") or "position" in name]
