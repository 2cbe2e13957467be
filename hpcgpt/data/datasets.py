"""The data sets of a run, one or several that are mixed: opened and compared with each other.

Data sets of a mix must have the same tokenizer and the same token width, and each must have enough windows for its
share of a global batch. No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcgpt.config.options import Config
from hpcgpt.data import mix, sample_order, shard_format, shard_reader
from hpcgpt.data.shard_format import Manifest
from hpcgpt.data.shard_reader import Split
from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted


@dataclass(frozen=True)
class DataSet:
    """An open data set. `samples_per_block`: see ``hpcgpt.data.mix``; `windows`: of an epoch of the training split."""

    name: str
    folder: Path
    manifest: Manifest
    samples_per_block: int
    train: Split
    val: Split | None
    windows: int

    @property
    def share(self) -> float:
        return self.samples_per_block / mix.MIX_BLOCK

    def describe(self, samples: int) -> str:
        """Describe what a run of this many samples reads of it."""
        return (
            f"{self.share:.2%} from {self.name}, {samples * self.share / self.windows:,.2f} epochs of {self.windows:,} "
            f"windows{'' if self.val else ', no validation'}"
        )


def open_all(config: Config, check_sizes: bool) -> list[DataSet]:
    """Open the data sets that `config` names, in its order.

    Raises:
        UserError: one is missing or damaged, too small, or does not match the others.
    """
    parts = config.data.mix
    folders = [Path(part.dir) for part in parts] or [Path(config.data.dir)]
    counts = mix.divide_block([part.weight for part in parts] or [1.0])
    for folder, count in zip(folders, counts, strict=True):
        if not count:
            raise UserError(
                f"data.mix: the weight of {folder} is less than one sample in {mix.MIX_BLOCK:,}: leave it out, or "
                "raise it"
            )
    manifests = [shard_format.read_manifest(folder) for folder in folders]
    _check_same_tokens(folders, manifests)
    found = [_open(config, *part, check_sizes) for part in zip(names(folders), folders, manifests, counts, strict=True)]
    if config.eval.every and not any(part.val for part in found):
        where = folders[0] if len(folders) == 1 else "none of the data sets"
        raise UserError(
            f"{where} has{'' if len(folders) > 1 else ' no'} val shards: pass --eval.every 0 to train without "
            "validation, or make shards with a --val-fraction"
        )
    return found


def names(folders: Sequence[Path]) -> list[str]:
    """Return the names of data sets in metrics: the last part of each path, or as many parts as make them differ."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        found = [".".join(part[-count:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return found


def _check_same_tokens(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first, seen = manifests[0], dict[str, Path]()
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.digest in seen:
            raise UserError(f"data.mix: {folder} and {seen[manifest.digest]} are the same data set: give it one weight")
        seen[manifest.digest] = folder
        tokenizer, expected = manifest.tokenizer, first.tokenizer
        if tokenizer["fingerprint"] != expected["fingerprint"]:
            raise UserError(
                f"data.mix: {folder} was made with tokenizer {tokenizer['name']} ({tokenizer['fingerprint'][:12]}), "
                f"but {folders[0]} with {expected['name']} ({expected['fingerprint'][:12]}): make one of them again"
            )
        if manifest.dtype != first.dtype:
            raise UserError(
                f"data.mix: {folder} holds {manifest.dtype} tokens, but {folders[0]} {first.dtype}: make the shards of "
                "one of them again, with the other's --dtype"
            )


def _open(config: Config, name: str, folder: Path, manifest: Manifest, count: int, check_sizes: bool) -> DataSet:
    block_size, batch = config.model.block_size, config.train.global_batch
    train = shard_reader.open_split(folder, manifest, "train", check_sizes)
    windows = sample_order.window_count(train.tokens, block_size, config.stride)
    if windows * mix.MIX_BLOCK < batch * count:
        part = "" if count == mix.MIX_BLOCK else f"its {count / mix.MIX_BLOCK:.2%} of "
        raise UserError(
            f"{folder} has {counted(windows, 'window')} of {block_size} tokens, fewer than {part}one global batch "
            f"of {batch}: "
            "add text, or lower train.global_batch or model.block_size"
        )
    val = None
    if config.eval.every and "val" in manifest.splits:
        val = shard_reader.open_split(folder, manifest, "val", check_sizes)
        if not sample_order.window_count(val.tokens, block_size, block_size):
            raise UserError(
                f"the validation split of {folder} has {val.tokens:,} tokens, less than one window of "
                f"{block_size}: make shards with a larger --val-fraction"
            )
    return DataSet(name, folder, manifest, count, train, val, windows)
