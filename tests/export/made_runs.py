"""Run folders of tiny models with random weights, as training leaves them, for tests of exports."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import sources
from hpcgpt.config.options import Config, Data, Model, Run
from hpcgpt.model.gpt import GPT
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters
from hpcgpt.tokenizer.from_tiktoken import GPT2_PATTERN

STEP = 7
END = "<|endoftext|>"


def tokenizer() -> ByteLevelBPE:
    """Return a byte-level BPE of 300 ids: the bytes in GPT-2's order, 43 merges, end-of-text."""
    ranks = {bytes([byte]): number for number, byte in enumerate(byte_characters())}
    pairs = [
        "th",
        "he",
        "in",
        "er",
        "an",
        "re",
        "on",
        "at",
        "en",
        "nd",
        "ti",
        "es",
        "or",
        "te",
        "of",
        "ed",
        "is",
        "it",
        "al",
        "ar",
        "st",
        "to",
        "nt",
        "ng",
        "se",
        "ha",
        "as",
        "ou",
        "io",
        "le",
        "ve",
        "co",
        "me",
    ]
    merges = [*pairs, " t", " a", "the", " th", " the", "ing", "tion", "and", " and", "ion"]
    for merge in merges:
        ranks.setdefault(merge.encode(), len(ranks))
    return ByteLevelBPE.from_ranks("tiny", GPT2_PATTERN, ranks, {END: 299}, 299)


def make(folder: Path, model: Model, ranks: int = 1) -> Path:
    """Make the folder of a run with a checkpoint of step 7, in the shares of this many ranks; its shards are gone."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"id": "abc", "created": 0.0}))
    config = Config(
        model=model, run=Run(name=folder.name, dir=str(folder.parent), threads=1), data=Data(dir="/there/is/none")
    )
    (folder / "config.toml").write_text(sources.to_toml(config))
    save_load.save(tokenizer(), folder / "tokenizer")
    row = {"step": STEP, "val/loss": 4.25, "val/bits_per_byte": 3.125}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ({"step": 6}, row)))
    save(folder, weights(model), ranks)
    return folder


def weights(model: Model, seed: int = 1) -> dict[str, Tensor]:
    """Return random float32 weights in which no gain is 1, no bias 0, and padding rows are not zero either."""
    made = GPT(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return {name: parameter.detach() for name, parameter in made.named_parameters()}


def save(folder: Path, tensors: dict[str, Tensor], ranks: int, step: int = STEP) -> None:
    """Write a checkpoint whose tensors are divided by rows among `ranks`, as fsdp divides them."""
    state = State(step, 64 * step, 2 * step, ranks, {"digest of the shards": "0123abcd"}, None, 4.25)
    path = layout.path_of(folder / "checkpoints", step)
    path.mkdir()
    content = layout.state_bytes(state)
    (path / "state.json").write_bytes(content)
    files = {"state.json": safetensors_writer.fingerprint(content)}
    for rank in range(ranks):
        name = layout.share_name(rank, ranks)
        files[name] = safetensors_writer.write(path / name, _share(tensors, rank, ranks))
    (path / "manifest.json").write_bytes(layout.manifest_bytes(files, 1))


def _share(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    if ranks == 1:
        return {f"model/{name}": tensor for name, tensor in tensors.items()}
    found = {}
    for name, tensor in tensors.items():
        most = math.ceil(len(tensor) / ranks)
        first, after = min(len(tensor), rank * most), min(len(tensor), (rank + 1) * most)
        if first < after:
            found[f"model/{name}[{first}:{after}]"] = tensor[first:after].contiguous()
    # As with every optimizer, there are more tensors than the weights.
    return found | {f"optim/norm.weight/exp_avg[{rank}:{rank + 1}]": torch.zeros(1)}


GPT2 = Model(n_layer=3, n_head=4, n_embd=48, block_size=32, vocab_size=300)
QWEN3 = replace(GPT2, kind="modern", n_kv_head=2, qkv_bias=False)
LLAMA = replace(QWEN3, qk_norm=False)
MODELS = {
    "gpt2": GPT2,
    # 320 rows need no padding.
    "gpt2 untied, unpadded, without qkv biases": replace(GPT2, tied=False, vocab_size=320, qkv_bias=False),
    "gpt2 exact gelu, wide mlp, epsilon": replace(GPT2, gelu="exact", mlp_width=80, norm_eps=1e-6),
    "qwen3": QWEN3,
    "qwen3 untied, unpadded, heads of 20": replace(QWEN3, tied=False, vocab_size=320, head_size=20, rope_base=5e5),
    "llama": replace(LLAMA, tied=False),
    "llama with biases, longer context": replace(LLAMA, qkv_bias=True, norm_eps=1e-5, rope_factor=8.0, rope_context=16),
}
