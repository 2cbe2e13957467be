"""A Hugging Face config.json: which of our models it states, or which key it states that ours cannot have.

Every key is either translated, or has a value that leaves the computation as ours is, or is named as not used. A key
that is missing has the value that transformers gives it.

The file may come from anywhere: it is read as data, sizes are bounded, and code that it refers to (``auto_map``) is
never run. No torch in here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hpcgpt.config import contradictions
from hpcgpt.config.options import Config, Model
from hpcgpt.errors import UserError, cannot_read
from hpcgpt.export import huggingface_config

KINDS = ("gpt2", "llama", "qwen2", "qwen3")
MOST_BYTES = 1 << 20  # of a config.json; released ones have about 1 kB
MOST = 1 << 24  # of any size in it: more layers, heads or channels than any model has
# Keys that say nothing about what the model computes.
_SILENT = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attn_pdrop",
    "bos_token_id", "chunk_size_feed_forward",
    "dtype", "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "max_window_layers", "model_type", "n_ctx", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "reorder_and_upcast_attn", "resid_pdrop",
    "return_dict", "sliding_window", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass
class Read:
    """The model that a config.json states. `kind`: its model_type. `notes`: what a person should know, one a line."""

    kind: str
    model: Model
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Read:
    """Read and translate a config.json.

    Raises:
        UserError: it cannot be read, or states something that our models cannot have.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} is larger than {MOST_BYTES >> 20} MB: that is no config.json")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot_read(error, f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object, found {type(content).__name__}")
    keys = _Keys(path, content)
    if "auto_map" in content or "quantization_config" in content:
        key = "auto_map" if "auto_map" in content else "quantization_config"
        why = "a model with code of its own" if key == "auto_map" else "quantized weights"
        raise keys.refused(key, f"{why} cannot be imported")
    huggingface_config.refuse_code(path, content)
    kind = keys.text("model_type", "")
    if kind not in KINDS:
        raise keys.refused("model_type", f"those that can be imported are {', '.join(KINDS)}")
    found = _gpt2(keys) if kind == "gpt2" else _rotary(keys, kind)
    for problem in contradictions.find(replace(Config(), model=found.model)):
        if problem.startswith("model."):
            raise UserError(f"{path}: {problem}")
    if unused := sorted(str(key) for key in content.keys() - keys.asked - _SILENT):
        found.notes.append(f"not used of config.json: {', '.join(unused)}")
    found.notes += _other_ends(content)
    return found


def _other_ends(content: dict[str, Any]) -> list[str]:
    """Note what a config.json says of the beginnings and ends of texts that a tokenizer of ours does not keep."""
    first, last = content.get("bos_token_id"), content.get("eos_token_id")
    ends = last if isinstance(last, list) else [last]
    notes = []
    if type(first) is int and last is not None and first not in ends:
        notes.append(
            f"texts began with token {first} (bos_token_id): here, and in exports, they begin with end-of-text"
        )
    if len(ends) > 1:
        notes.append(f"of {len(ends)} tokens that end a text (eos_token_id) only the tokenizer's end-of-text is kept")
    return notes


class _Keys:
    """The keys of a config.json, by type; `asked` are those that were read."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self._path, self._content = path, content
        self.asked: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return self._content.get(key, default)

    def text(self, key: str, default: str) -> str:
        return str(self._typed(key, default, lambda value: isinstance(value, str), "text"))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._typed(key, default, lambda value: isinstance(value, bool), "true or false"))

    def size(self, key: str, default: int | None = None) -> int:
        return int(self._typed(key, default, lambda v: type(v) is int and 0 < v <= MOST, f"an integer up to {MOST:,}"))

    def optional_size(self, key: str) -> int:
        """Return a size, 0 if it is missing or null."""
        return 0 if self.value(key) is None else self.size(key)

    def number(self, key: str, default: float) -> float:
        return float(self._typed(key, default, _is_positive, "a number greater than 0"))

    def epsilon(self, key: str, default: float) -> float:
        """Return the epsilon of norms, 0.0 if it is the default."""
        value = float(self._typed(key, default, lambda v: _is_positive(v) and v < 1, "a number from 0 to 1"))
        return 0.0 if value == default else value

    def rope_base(self, key: str, default: float) -> float:
        return float(self._typed(key, default, lambda v: _is_positive(v) and v > 1, "a number greater than 1"))

    def must_be(self, key: str, allowed: Any, default: Any, because: str) -> None:
        """Refuse any value of a key but one. A missing key has the value `default`."""
        if self.value(key, default) != allowed:
            raise self.refused(key, because)

    def within(self, key: str) -> _Keys | None:
        """Return the keys of an object, None if it is missing or null."""
        value = self._typed(key, {}, lambda value: isinstance(value, dict | None), "an object")
        return _Keys(Path(f"{self._path}: {key}"), value) if value else None

    def refused(self, key: str, because: str) -> UserError:
        value = json.dumps(self._content.get(key))
        value = value if len(value) <= 100 else value[:100] + "..."
        return UserError(f"{self._path}: {key} is {value}: {because}")

    def unread(self) -> list[str]:
        return sorted(self._content.keys() - self.asked)

    def _typed(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        found = self.value(key, default)
        if not fits(found):
            if key not in self._content:
                raise UserError(f"{self._path}: it has no {key}")
            raise self.refused(key, f"expected {expected}")
        return found


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")  # true is an int, too


def _gpt2(keys: _Keys) -> Read:
    keys.must_be("scale_attn_weights", True, True, "our attention divides scores by the root of the head size")
    keys.must_be("scale_attn_by_inverse_layer_idx", False, False, "our attention is the same in each layer")
    keys.must_be("add_cross_attention", False, False, "our models have no encoder")
    gelu: dict[str, Literal["tanh", "exact"]] = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    activation = keys.text("activation_function", "gelu_new")
    if activation not in gelu:
        raise keys.refused("activation_function", f"our gpt2 has {', '.join(gelu)}")
    model = Model(
        kind="gpt2", n_layer=keys.size("n_layer"), n_head=keys.size("n_head"), n_embd=keys.size("n_embd"),
        block_size=keys.size("n_positions"), vocab_size=keys.size("vocab_size"),
        tied=keys.flag("tie_word_embeddings", True), norm_eps=keys.epsilon("layer_norm_epsilon", 1e-5),
        gelu=gelu[activation],
    )  # fmt: skip
    width = keys.optional_size("n_inner")
    return Read("gpt2", replace(model, mlp_width=0 if width == model.hidden_width else width))


def _rotary(keys: _Keys, kind: str) -> Read:
    """Translate the config.json of Llama, Qwen2 or Qwen3."""
    keys.must_be("hidden_act", "silu", "silu", "our modern block has SwiGLU, whose activation is silu")
    keys.must_be("mlp_bias", False, False, "our modern block has no biases in its MLP")
    keys.must_be("use_sliding_window", False, False, "our attention has no sliding window")
    keys.must_be("partial_rotary_factor", 1.0, 1.0, "our heads are rotated as a whole")
    layers = keys.size("num_hidden_layers")
    types = keys.value("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise keys.refused("layer_types", "all of our layers are full_attention")
    heads = keys.size("num_attention_heads")
    model = Model(
        kind="modern", n_layer=layers, n_head=heads, n_embd=keys.size("hidden_size"),
        block_size=keys.size("max_position_embeddings"), vocab_size=keys.size("vocab_size"),
        tied=keys.flag("tie_word_embeddings", False), norm_eps=keys.epsilon("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3", qkv_bias=kind == "qwen2" or keys.flag("attention_bias", False),
    )  # fmt: skip
    # The defaults are those of transformers' classes.
    groups = keys.optional_size("num_key_value_heads") or (32 if kind == "qwen3" else heads)
    size = keys.optional_size("head_dim") or (128 if kind == "qwen3" else model.n_embd // heads)
    model = replace(model, n_kv_head=0 if groups == heads else groups)
    model = replace(model, head_size=0 if size * heads == model.n_embd else size)
    width = keys.size("intermediate_size")
    model = replace(model, mlp_width=0 if width == model.hidden_width else width)
    # With attention_bias, transformers' Llama and Qwen3 have a fourth bias, in the projection back; Qwen2 never has it.
    # Ours has none, so it must be zero: see `zeros` in hpcgpt.export.tensor_names.
    return Read(kind, _with_rope(model, keys))


def _with_rope(model: Model, keys: _Keys) -> Model:
    """Return the model with its rotary base and scaling: in rope_parameters, or before transformers 5 in two keys."""
    whole, scaling = keys.within("rope_parameters"), keys.within("rope_scaling")
    where = whole or scaling
    base = keys.rope_base("rope_theta", whole.rope_base("rope_theta", 10_000.0) if whole else 10_000.0)
    model = replace(model, rope_base=base)
    if where is None:
        return model
    where.value("rope_theta")
    where.must_be("partial_rotary_factor", 1.0, 1.0, "our heads are rotated as a whole")
    kind = where.text("rope_type", where.text("type", "default"))
    if kind == "llama3":
        model = replace(
            model, rope_factor=where.number("factor", 1.0), rope_low=where.number("low_freq_factor", 1.0),
            rope_high=where.number("high_freq_factor", 4.0),
            rope_context=where.size("original_max_position_embeddings"),
        )  # fmt: skip
    elif kind != "default":
        raise where.refused("rope_type" if where.value("rope_type") else "type", "ours are default and llama3")
    if unread := where.unread():
        raise where.refused(unread[0], f"rotary positions of type {kind} have no such key here")
    return model
