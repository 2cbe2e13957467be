"""config.json and generation_config.json of an export, in the words of Hugging Face's transformers.

What each key means is defined by the configuration classes of transformers (``GPT2Config``, ``Qwen3Config``,
``LlamaConfig``). Rotary positions are written as released models have them, ``rope_theta`` and ``rope_scaling``, which
every version of transformers reads, and other programs as well. Also which keys of a foreign one are refused. No torch
in here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export.tensor_names import Architecture

MODEL_TYPES: dict[str, str] = {
    "GPT2LMHeadModel": "gpt2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
# Theirs for model.gelu.
ACTIVATIONS = {"tanh": "gelu_new", "exact": "gelu"}
# Keys by which transformers takes code or another file, from the folder or from a hub.
_CODE = re.compile("implementation|kernel|auto_map|configuration_files|quantization_config")
# Whether transformers had chosen the implementation by itself: versions before 5 saved it.
_HARMLESS = {"_attn_implementation_autoset"}


def refuse_code(path: Path, keys: Iterable[str]) -> None:
    """Raise UserError if one of the keys of the config.json at `path` chooses code or other files."""
    if named := sorted(key for key in keys if _CODE.search(key) and key not in _HARMLESS):
        raise UserError(f"{path}: {named[0]} chooses code or files of its own: remove this key")


def config(model: Model, target: Architecture, end_of_text: int, dtype: str) -> dict[str, Any]:
    """Return the content of config.json. `dtype`: that of the weights, `float32` or `bfloat16`.

    Raises:
        UserError: `target` cannot state this model.
    """
    own = _gpt2(model) if target == "GPT2LMHeadModel" else _modern(model, target)
    return {
        "architectures": [target],
        "model_type": MODEL_TYPES[target],
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied,
        **own,
        "initializer_range": model.init_std,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def generation_config(end_of_text: int) -> dict[str, Any]:
    """Return the content of generation_config.json: documents begin with end-of-text, so a text ends there."""
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


def _gpt2(model: Model) -> dict[str, Any]:
    return {
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_embd": model.n_embd,
        "n_inner": model.mlp_width or None,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "activation_function": ACTIVATIONS[model.gelu],
        "layer_norm_epsilon": model.epsilon,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
    }


def _modern(model: Model, target: Architecture) -> dict[str, Any]:
    if target == "LlamaForCausalLM" and model.n_embd % model.n_head:
        raise UserError(
            f"LlamaForCausalLM cannot state this model: its n_embd {model.n_embd} is not a multiple of its n_head "
            f"{model.n_head}, which transformers refuses for Llama"
        )
    found: dict[str, Any] = {
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_width,
        "hidden_size": model.n_embd,
        "intermediate_size": model.hidden_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.epsilon,
        "max_position_embeddings": model.block_size,
        "rope_theta": model.rope_base,
        "rope_scaling": None if model.rope_factor == 1 else _rope_scaling(model),
        "attention_bias": model.qkv_bias,
        "attention_dropout": model.dropout,
    }
    return found | ({"mlp_bias": False} if target == "LlamaForCausalLM" else {"use_sliding_window": False})


def _rope_scaling(model: Model) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": model.rope_factor,
        "low_freq_factor": model.rope_low,
        "high_freq_factor": model.rope_high,
        "original_max_position_embeddings": model.rope_context,
    }
