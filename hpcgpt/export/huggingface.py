"""Writes a run's model as a folder that Hugging Face's transformers opens.

::

    OUT/
      config.json                        see hpcgpt.export.huggingface_config
      generation_config.json
      model.safetensors                  or model-00001-of-00003.safetensors, ... and model.safetensors.index.json
      tokenizer.json, tokenizer_config.json, special_tokens_map.json     see hpcgpt.export.tokenizer_files
      README.md                          see hpcgpt.export.model_card

Weights are read, converted and written tensor by tensor, in the order of the forward pass. What is in memory is the
largest one, in the check also in float64, and not the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import safetensors_writer
from hpcgpt.export import huggingface_config, huggingface_model, tensor_names, tokenizer_files
from hpcgpt.export.agreement import Agreement, compare, ours
from hpcgpt.export.source import Probe, Source
from hpcgpt.export.tensor_names import Architecture, Piece

SHARD_BYTES = 5_000_000_000


def write(source: Source, folder: Path) -> None:
    """Write weights, configuration and tokenizer into `folder`. A file has at most SHARD_BYTES, or one tensor.

    Raises:
        UserError: Hugging Face's class cannot state this model.
        OSError: the disk is full, or fails.
    """
    target = tensor_names.architecture(source.model)
    end = source.tokenizer.end_of_text
    config = huggingface_config.config(source.model, target, end, source.dtype_name)
    small = {"config.json": config, "generation_config.json": huggingface_config.generation_config(end)}
    for name, content in small.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name, made in tokenizer_files.files(source.tokenizer, source.model.block_size).items():
        (folder / name).write_bytes(made)
    write_weights(source, target, folder, SHARD_BYTES)


def write_weights(source: Source, target: Architecture, folder: Path, shard_bytes: int) -> None:
    """Write the safetensors files, and their index if there are several."""
    shards = divide(source, source.pieces(target), shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = huggingface_model.SINGLE if len(shards) == 1 else name
        about = {piece.theirs: (source.dtype, piece.shape) for piece in shard}
        # transformers refuses files without this mark of the library that the tensors are from.
        metadata = {"format": "pt"}
        safetensors_writer.write_one_by_one(folder / name, about, map(source.tensor, shard), metadata)
        weight_map |= dict.fromkeys(about, name)
        total += sum(map(safetensors_writer.byte_count, about.values()))
    if len(shards) > 1:
        index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / huggingface_model.INDEX).write_text(json.dumps(index, indent=2) + "\n")


def divide(source: Source, pieces: list[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Divide tensors among files of at most `shard_bytes`, in their order."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        added = safetensors_writer.byte_count((source.dtype, piece.shape))
        if shards[-1] and size + added > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += added
    return shards


def check(source: Source, folder: Path, probe: Probe) -> Agreement:
    """Check that transformers computes with the files of `folder` what the run does, and that tokenizers agree.

    Raises:
        DisagreementError: it does not.
        UserError: the tokenizer gives other ids.
    """
    tokenizer_files.check(source.tokenizer, huggingface_model.encoder(folder), probe.texts)
    names = tensor_names.modules(source.model, tensor_names.architecture(source.model))
    theirs = huggingface_model.forward(folder, names)
    return compare(ours(source.model, source.read()), theirs, probe.ids, source.model)


USAGE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

A text begins with the end-of-text token, as the documents did that the model was trained on.
"""
