"""Writes a run's model as nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT, train.py and sample.py).

::

    OUT/
      ckpt.pt      {"model": tensors by name, "model_args": ..., "iter_num": step, "best_val_loss": nats, "config": {}}
      README.md

The names are GPT-2's of Hugging Face, matrices are (outputs, inputs), and ``lm_head.weight`` is the embedding. There
is no optimizer in it: sample.py reads it, and so does ``load_state_dict``; train.py resumes only from files with one.

nanoGPT's GELU is the exact one (torch's default), and GPT-2's is the tanh form. nanoGPT loads released GPT-2 weights in
spite of that, and so may ours be; what it does to the loss is measured and written down.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import huggingface, huggingface_model, reference_gpt2
from hpcgpt.export.agreement import Agreement, Forward, compare, loss, losses, ours
from hpcgpt.export.on_demand import Read
from hpcgpt.export.source import Probe, Source
from hpcgpt.storage import atomic
from hpcgpt.tokenizer import find_tokenizer
from hpcgpt.tokenizer.interface import Tokenizer

FILE = "ckpt.pt"
EPSILON = 1e-5


def refuse(model: Model, program: str = "nanoGPT") -> None:
    """Check that nanoGPT, or another `program` with GPT-2's model alone, can state this model.

    Raises:
        UserError: it cannot; the message says why.
    """
    reasons = [
        (model.kind != "gpt2", f'model.kind is "{model.kind}", and its model is GPT-2\'s'),
        (not model.tied, "model.tied is false, and its head is the token embedding"),
        (model.hidden_width != 4 * model.n_embd, f"its MLP has 4 n_embd channels, and this one {model.hidden_width:,}"),
        (model.epsilon != EPSILON, f"the epsilon of its norms is {EPSILON:g}, and here {model.epsilon:g}"),
    ]
    if found := [reason for applies, reason in reasons if applies]:
        raise UserError(f"{program} cannot state this model: {'; '.join(found)}. Use --to hf")


def write(source: Source, folder: Path) -> None:
    """Write ckpt.pt into `folder`. What is in memory is one tensor: the others are mapped from a file meanwhile.

    Raises:
        OSError: the disk is full, or fails. It needs room for the weights twice.
    """
    model = source.model
    huggingface.write_weights(source, "nanoGPT", folder, shard_bytes=1 << 62)
    path = folder / huggingface_model.SINGLE
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    checkpoint = {
        "model": tensors,
        "model_args": {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_embd": model.n_embd,
            "block_size": model.block_size,
            "bias": True,
            "vocab_size": model.vocab_size,
            "dropout": model.dropout,
        },
        "iter_num": source.state.step,
        "best_val_loss": source.val_loss if source.val_loss is not None else 1e9,  # as nanoGPT before its first
        "config": {},
    }
    with atomic.open_plain(folder / FILE) as file:  # torch itself says "unexpected pos" where a disk is full
        torch.save(checkpoint, file)
    path.unlink()


def check(source: Source, folder: Path, probe: Probe) -> Agreement:
    """Check that the weights in ckpt.pt compute what the run does, with the run's form of GELU.

    Raises:
        DisagreementError: they do not.
    """
    return compare(ours(source.model, source.read()), _forward(source, folder), probe.ids, source.model)


def notes(source: Source, folder: Path, probe: Probe) -> list[str]:
    """Say what nanoGPT does otherwise."""
    found = []
    if source.model.gelu == "tanh":
        exact = dataclasses.replace(source.model, gelu="exact")
        before, after = (loss(_forward(source, folder, model), probe.ids) for model in (source.model, exact))
        found.append(
            f"nanoGPT's GELU is the exact one, and the run's the tanh form of GPT-2: {losses(after, before, 'there ')}"
        )
    if not is_gpt2s(source.tokenizer):
        found.append(
            f"sample.py decodes ids with GPT-2's tokenizer, and this model has another one, {source.tokenizer.name}"
        )
    return found


def is_gpt2s(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has GPT-2's pattern, vocabulary and special tokens, whatever its name."""
    return tokenizer.fingerprint == find_tokenizer.gpt2().fingerprint


def read(folder: Path) -> Read:
    """Return a function that reads a tensor of ckpt.pt by its name."""
    stored: dict[str, Tensor] = torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=True)["model"]
    return stored.__getitem__


def _forward(source: Source, folder: Path, model: Model | None = None) -> Forward:
    return reference_gpt2.forward(reference_gpt2.shape_of(model or source.model), read(folder))


USAGE = """
```bash
python sample.py --out_dir=THIS_FOLDER    # in a checkout of nanoGPT
```
"""
