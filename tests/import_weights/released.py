"""Folders of tiny models with random weights, as transformers saves released ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpcgpt.export import tokenizer_files
from hpcgpt.tokenizer import save_load

KINDS = ("gpt2", "llama", "qwen3")
IDS = 517  # more than the tokenizer's 512, and no multiple of 64


def model(kind: str, **changes: Any) -> Any:
    """Return a random model of transformers in which no gain is 1, and no bias 0."""
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": IDS,
    }  # fmt: skip
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    made: Any
    torch.manual_seed(3)
    if kind == "gpt2":
        shape = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": IDS}
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | changes))
    elif kind == "llama":
        shape |= {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": scaling, "head_dim": 16}
        made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape | changes))
    elif kind == "qwen2":
        made = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape | changes))
    else:
        shape |= {"head_dim": 20, "rope_theta": 1e6, "tie_word_embeddings": True}
        made = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape | changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return made.eval()


def folder(path: Path, kind: str, tokenizer: Path, **changes: Any) -> Path:
    """Save such a model in `path`, with the tokenizer of ours in the folder `tokenizer`."""
    model(kind, **changes).save_pretrained(path)
    for name, content in tokenizer_files.files(save_load.load(tokenizer), 64).items():
        (path / name).write_bytes(content)
    return path
