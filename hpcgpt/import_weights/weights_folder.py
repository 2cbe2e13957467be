"""Writes imported weights as a run folder at step 0, so that every command that reads a run reads them.

::

    OUT/
      config.toml          the model, and a new run that begins with these weights: `hpcgpt train OUT/config.toml`
      run.json             as in any run folder: see hpcgpt.run.run_folder
      imported.json        where the weights come from: see `Origin`
      tokenizer/           as in any run folder
      checkpoints/step_000000000/      weights alone, in the dtypes of the source: no optimizer, no generators

The identity in the checkpoint's state.json is that of the model alone: it was trained on no shards. An attempt never
trains in such a folder (``hpcgpt.checkpoint.init_from.check``); it begins a run of its own with the weights.

It gets its name when it is complete: see ``hpcgpt.export.new_folder``.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import sources
from hpcgpt.config.options import Model, Train
from hpcgpt.data.shard_format import WIDTHS
from hpcgpt.import_weights.assemble import Assembled
from hpcgpt.run import run_folder
from hpcgpt.storage import atomic
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.interface import Tokenizer

_COMMENT = """\
# Weights that `hpcgpt import` took from {source}. To train on from them, in a new run:
#   python -m data_prep.make_shards TEXT --tokenizer {out}/tokenizer --out data/shards{wide}
#   hpcgpt train {out}/config.toml --data.dir data/shards
# Options that are not here have their defaults: think about optim.lr, schedule.* and train.*, as for any run.

"""
# What a micro-batch may need without a word from the user: as many tokens as GPT-2's 16 sequences of 1,024, and logits
# in float32 of 4 GiB. A released context of 40,960 tokens and 151,936 ids would need 400 GB of them.
_TOKENS, _LOGIT_BYTES, _CHUNK = 1 << 14, 4 << 30, 1024


@dataclass(frozen=True)
class Origin:
    """The content of imported.json. `source`: path; `format`: as huggingface/llama; `bytes`: size of its files by name.

    `source_model`: its options, before vocabulary and context were fitted. `notes`: what was said about it.
    """

    source: str
    format: str
    bytes: dict[str, int]
    source_model: dict[str, Any]
    notes: list[str]


def write(folder: Path, out: Path, assembled: Assembled, tokenizer: Tokenizer, origin: Origin) -> None:
    """Fill `folder`, which will be renamed `out`.

    Raises:
        UserError: the model is none that a configuration can have; the message names the option.
        OSError: there is no room.
    """
    configuration = _config(out, assembled.model, tokenizer, origin)
    atomic.write(folder / "config.toml", configuration.encode())
    sources.from_file(folder / "config.toml")  # before gigabytes are written
    run_folder.prepare(folder)
    save_load.save(tokenizer, folder / "tokenizer")
    _write_checkpoint(layout.path_of(folder / "checkpoints", 0), assembled)
    atomic.write(folder / run_folder.IMPORTED, (json.dumps(dataclasses.asdict(origin), indent=1) + "\n").encode())


def _write_checkpoint(path: Path, assembled: Assembled) -> None:
    path.mkdir()
    name, about = layout.share_name(0, 1), {f"model/{ours}": what for ours, what in assembled.about.items()}
    files = {name: safetensors_writer.write_one_by_one(path / name, about, map(assembled.make, assembled.about))}
    identity = {f"model.{key}": value for key, value in dataclasses.asdict(assembled.model).items()}
    state = layout.state_bytes(State(step=0, tokens=0, samples=0, world_size=1, identity=identity))
    atomic.write(path / "state.json", state)
    files["state.json"] = safetensors_writer.fingerprint(state)
    atomic.write(path / "manifest.json", layout.manifest_bytes(files, generation=0))


def _config(out: Path, model: Model, tokenizer: Tokenizer, origin: Origin) -> str:
    """Return config.toml: what differs from the defaults, the sizes, and what bounds memory."""
    sizes = ("kind", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "qkv_bias", "tied")
    default = dataclasses.asdict(Model())
    options = {key: value for key, value in dataclasses.asdict(model).items() if key in sizes or value != default[key]}
    content = {
        "run": {"name": f"{out.name}-continued", "init_from": str(out.resolve())},
        "data": {"tokenizer": tokenizer.fingerprint},
        "model": options,
    }
    if train := _train(model):
        content["train"] = train
    wide = " --dtype uint32" if model.vocab_size > WIDTHS["uint16"].most_ids else ""
    comment = _COMMENT.format(source=_printable(origin.source), out=_printable(str(out)), wide=wide)
    return comment + tomli_w.dumps(content)


def _train(model: Model) -> dict[str, int]:
    """Return a train.micro_batch and train.loss_chunk that bound the memory of large contexts and vocabularies."""
    found, micro_batch = {}, Train().micro_batch
    while micro_batch > 1 and micro_batch * model.block_size > _TOKENS:
        micro_batch //= 2
    if micro_batch != Train().micro_batch:
        found["micro_batch"] = micro_batch
    tokens = micro_batch * model.block_size
    if 4 * tokens * model.vocab_size > _LOGIT_BYTES and tokens > _CHUNK:
        found["loss_chunk"] = _CHUNK
    return found


def _printable(text: str) -> str:
    """Return `text` on one line, so that it stays within a comment."""
    return text.encode("unicode_escape").decode() if not text.isprintable() else text
