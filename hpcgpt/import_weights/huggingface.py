"""Models in folders as Hugging Face has them: config.json, and weights as safetensors or, if need be, pickles."""

from __future__ import annotations

from pathlib import Path

from hpcgpt.errors import UserError
from hpcgpt.export import tensor_names
from hpcgpt.export.tensor_names import Architecture
from hpcgpt.import_weights import config_json, stored
from hpcgpt.import_weights.assemble import Source

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read(folder: Path) -> Source:
    """Return what is in a folder with a config.json.

    Raises:
        UserError: it cannot be read, or is a model that ours cannot be.
    """
    found = config_json.read(folder / "config.json")
    tensors = stored.of_folder(folder)
    # Before anything is made that has as many parts as a file claims.
    if found.model.n_layer > len(tensors):
        raise UserError(
            f"{folder}: config.json says {found.model.n_layer:,} layers, and there are {len(tensors):,} tensors"
        )
    pieces = tensor_names.pieces(found.model, ARCHITECTURES[found.kind])
    notes = [*found.notes, "not used: the chat template"] if _has_chat_template(folder) else found.notes
    return Source(str(folder), f"huggingface/{found.kind}", found.model, pieces, tensors, notes=notes)


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    try:
        return b'"chat_template"' in (folder / "tokenizer_config.json").read_bytes()
    except OSError:
        return False
