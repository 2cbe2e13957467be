"""hpcgpt.import_weights.config_json: what a config.json states, translated or refused by the name of its key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.import_weights import config_json

# As in the repositories of these models, without keys that say nothing about the computation.
GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05, "n_ctx": 1024,
        "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "vocab_size": 50257}  # fmt: skip
LLAMA = {
    "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048, "head_dim": 64,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16,
    "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def read(folder: Path, content: Any) -> config_json.Read:
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return config_json.read(folder / "config.json")


def test_released_models_are_translated_without_a_remark(tmp_path: Path) -> None:
    gpt2 = read(tmp_path, GPT2)
    assert (gpt2.model, gpt2.notes) == (Model(vocab_size=50257), [])
    llama = read(tmp_path, LLAMA)
    assert llama.notes == []
    assert llama.model == Model(
        kind="modern", n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, mlp_width=8192, block_size=131072,
        vocab_size=128256, qkv_bias=False, qk_norm=False, norm_eps=1e-5, rope_base=5e5, rope_factor=32.0,
    )  # fmt: skip
    qwen3 = read(tmp_path, QWEN3)
    assert qwen3.notes == []
    assert qwen3.model == Model(
        kind="modern", n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, head_size=128, mlp_width=3072,
        block_size=40960, vocab_size=151936, qkv_bias=False, rope_base=1e6,
    )  # fmt: skip


def test_the_keys_of_transformers_5_mean_the_same(tmp_path: Path) -> None:
    before = read(tmp_path, LLAMA).model
    moved = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "rope_theta")}
    scaling: Any = LLAMA["rope_scaling"]
    assert read(tmp_path, moved | {"rope_parameters": scaling | {"rope_theta": 500000.0}}).model == before
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    assert read(tmp_path, moved | {"rope_parameters": plain}).model == replace(before, rope_base=1e4, rope_factor=1.0)


def test_biases_are_those_of_qwen2_and_llamas_fourth_must_be_zero(tmp_path: Path) -> None:
    qwen2 = read(tmp_path, QWEN3 | {"model_type": "qwen2"})
    assert (qwen2.model.qkv_bias, qwen2.model.qk_norm) == (True, False)
    assert read(tmp_path, LLAMA | {"attention_bias": True}).model.qkv_bias


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model_type": "mixtral"},
            'model_type is "mixtral": those that can be imported are gpt2, llama, qwen2, qwen3',
        ),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps is 1.0: expected a number from 0 to 1"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0: expected a number greater than 1"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu": our modern block has SwiGLU'),
        ({"mlp_bias": True}, "mlp_bias is true: our modern block has no biases in its MLP"),
        ({"use_sliding_window": True}, "use_sliding_window is true: our attention has no sliding window"),
        ({"layer_types": ["sliding_attention"] * 16}, "layer_types is "),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_scaling: rope_type is "yarn": ours are default'),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 'rope_scaling: type is "linear": ours are default'),
        ({"rope_scaling": {"rope_type": "default", "truncate": True}}, "rope_scaling: truncate is true: "),
        ({"quantization_config": {"bits": 4}}, "quantization_config is "),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map is "),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation chooses code or files of its own"),
        ({"configuration_files": ["other.json"]}, "configuration_files chooses code or files of its own"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers is 1000000000000000000000000000000: expected an integer up"),
        ({"num_hidden_layers": True}, "num_hidden_layers is true: expected an integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1: expected an integer"),
        ({"num_key_value_heads": 5}, "model.n_head 32 must be a multiple of model.n_kv_head 5"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps is "1e-5": expected a number'),
        ({"rope_theta": float("inf")}, "rope_theta is Infinity: expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: expected true or false"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]: expected an object"),
    ],
)
def test_what_cannot_be_stated_exactly_is_refused_with_its_key_and_value(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, LLAMA | change)
    assert sentence in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False},
     {"add_cross_attention": True}],
)  # fmt: skip
def test_gpt2s_variants_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{next(iter(change))} is "):
        read(tmp_path, GPT2 | change)
    assert read(tmp_path, GPT2 | {"activation_function": "gelu"}).model.gelu == "exact"


def test_a_key_that_only_looks_like_a_choice_of_code_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"_attn_implementation_autoset": True}).notes == []


def test_a_key_that_is_not_known_is_named(tmp_path: Path) -> None:
    assert read(tmp_path, GPT2 | {"new_kind_of_norm": 3}).notes == ["not used of config.json: new_kind_of_norm"]
    missing = {key: value for key, value in GPT2.items() if key != "n_head"}
    with pytest.raises(UserError, match="it has no n_head"):
        read(tmp_path, missing)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"bos_token_id": 50256, "eos_token_id": 50256}, []),
        (
            {"bos_token_id": 151643, "eos_token_id": [151645, 151643]},
            ["of 2 tokens that end a text (eos_token_id)"],
        ),
        ({"bos_token_id": 128000, "eos_token_id": 128001}, ["texts began with token 128000 (bos_token_id): here,"]),
        ({"bos_token_id": 1, "eos_token_id": [2, 3]}, ["texts began with token 1 ", "of 2 tokens that end a text"]),
        ({"bos_token_id": None, "eos_token_id": 3}, []),
    ],
)
def test_beginnings_and_ends_of_texts_that_are_not_kept_are_noted(
    ends: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    notes = read(tmp_path, LLAMA | ends).notes
    assert [note for note, start in zip(notes, expected, strict=True) if not note.startswith(start)] == []


@pytest.mark.parametrize("content", ["", "[1]", "null", "{" * 100_000, '{"model_type": ' + "[" * 100_000, "\x00"])
def test_what_is_no_config_json_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path, content)
    (tmp_path / "config.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(UserError, match="larger than 1 MB"):
        config_json.read(tmp_path / "config.json")
