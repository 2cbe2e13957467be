"""What a run is going to do, worked out and checked before anything is queued or computed.

The configuration, the shards and the number of ranks are held against each other here, so that a batch
that cannot be divided, a missing shard or a wrong tokenizer costs a second on a login node and no GPU.

No torch in here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt import order, shard_reader, shards
from hpcgpt.config import Config
from hpcgpt.shard_reader import Split
from hpcgpt.shards import Manifest


@dataclass(frozen=True)
class Plan:
    """`config` has its open values filled in; `windows` are those of an epoch, `micro_steps` a rank's."""

    config: Config
    manifest: Manifest
    train: Split
    val: Split | None
    windows: int
    total_steps: int
    micro_steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.config.model.block_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume must find unchanged: the model, and which sample is the i-th."""
        model = {f"model.{key}": value for key, value in dataclasses.asdict(self.config.model).items()}
        return model | {
            "run.seed": self.config.run.seed,
            "data.stride": self.config.stride,
            "train.global_batch": self.config.train.global_batch,
            "digest of the shards": self.manifest.digest,
        }


def make(config: Config, world_size: int) -> Plan:
    """The plan of a run on `world_size` ranks.

    Raises:
        ValueError: something does not fit; the message says what would.
    """
    folder = Path(config.data.dir)
    manifest = shards.read_manifest(folder)
    if manifest.dtype != "uint16":
        raise ValueError(f"{folder} holds {manifest.dtype} tokens; this version reads uint16")
    config = _with_vocabulary(config, manifest)
    train = shard_reader.open_split(folder, manifest, "train")
    if config.eval.every and "val" not in manifest.splits:
        raise ValueError(
            f"{folder} has no val shards: pass --eval.every 0 to train without validation, or make "
            "shards with a --val-fraction"
        )
    val = shard_reader.open_split(folder, manifest, "val") if config.eval.every else None
    context, batch = config.model.block_size, config.train.global_batch
    windows = order.window_count(train.tokens, context, config.stride)
    if windows < batch:
        raise ValueError(
            f"{folder} has {windows:,} windows of {context} tokens, fewer than one global batch of {batch}: add "
            "text, or lower train.global_batch or model.block_size"
        )
    if val is not None and not order.window_count(val.tokens, context, context):
        raise ValueError(
            f"the validation split of {folder} has {val.tokens:,} tokens, less than one window of "
            f"{context}: make shards with a larger --val-fraction"
        )
    return Plan(
        config,
        manifest,
        train,
        val,
        windows,
        _total_steps(config, windows),
        micro_steps(batch, config.train.micro_batch, world_size),
    )


def micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Forward passes a rank makes for one optimizer step (gradient accumulation).

    Raises:
        ValueError: the global batch cannot be divided so.
    """
    steps, rest = divmod(global_batch, micro_batch * world_size)
    if rest:
        share = global_batch // world_size
        fitting = [n for n in range(1, share + 1) if share % n == 0] if global_batch % world_size == 0 else []
        advice = (
            f"with {world_size} ranks train.micro_batch may be {', '.join(map(str, fitting))}"
            if fitting
            else f"take a train.global_batch that is a multiple of {micro_batch * world_size}"
        )
        raise ValueError(
            f"train.global_batch {global_batch} is not a multiple of {world_size} ranks x train.micro_batch "
            f"{micro_batch}: {advice}"
        )
    return steps


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words."""
    return [f"{key} was {before.get(key)!r} and is now {now[key]!r}" for key in now if before.get(key) != now[key]]


def _with_vocabulary(config: Config, manifest: Manifest) -> Config:
    tokenizer, wanted = manifest.tokenizer, config.data.tokenizer
    if wanted and wanted != tokenizer["name"] and not tokenizer["fingerprint"].startswith(wanted):
        raise ValueError(
            f"data.tokenizer is {wanted}, but the shards in {config.data.dir} were made with {tokenizer['name']} "
            f"(fingerprint {tokenizer['fingerprint'][:12]}): point data.dir at other shards, or change data.tokenizer"
        )
    ids = int(tokenizer["vocab_size"])
    if config.model.vocab_size and config.model.vocab_size < ids:
        raise ValueError(
            f"model.vocab_size {config.model.vocab_size:,} is smaller than the {ids:,} ids of the shards' tokenizer "
            f"{tokenizer['name']}: leave it at 0 to take those"
        )
    highest = max(shard.max_id for shard in manifest.shards)
    if highest >= ids:
        raise ValueError(
            f"the shards in {config.data.dir} hold id {highest:,}, outside of their tokenizer's {ids:,} "
            "ids: they are damaged, make them again"
        )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or ids)
    )


def _total_steps(config: Config, windows: int) -> int:
    train = config.train
    if train.steps:
        return train.steps
    if train.tokens:
        return math.ceil(train.tokens / (train.global_batch * config.model.block_size))
    return max(1, math.floor(train.epochs * windows / train.global_batch))
