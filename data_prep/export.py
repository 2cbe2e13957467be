"""Shards -> nanoGPT's files: ``python -m data_prep.export DIR --to nanogpt --out FOLDER``.

FOLDER gets train.bin and val.bin as nanoGPT's own prepare.py would write them: uint16 tokens without a
header, end-of-text behind each document (before each one in our shards). Its meta.pkl is not written: a
pickle runs code when it is read, and without one nanoGPT takes 50,304 ids.

llm.c, modded-nanogpt and Megatron read the shards as they are, so for them there is nothing to export.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep.token_files import chunked_file
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import Manifest, Width
from hpcgpt.data.shard_reader import Split
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic

SPLITS = ("train", "val")
NANOGPT_IDS = 50_304


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.export", description="Shards -> nanoGPT's files.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument("--to", required=True, choices=["nanogpt"])
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for train.bin and val.bin")
    options = parser.parse_args(argv)
    folder, out = Path(paths.expand(options.DIR, "DIR")), Path(paths.expand(options.out, "--out"))
    manifest = shard_format.read_manifest(folder)
    for path, tokens in export(folder, manifest, out):
        print(
            f"{path}: {tokens:,} tokens as uint16, end-of-text {manifest.tokenizer['end_of_text']} behind each document"
        )
    ids = manifest.tokenizer["vocab_size"]
    print(f"no meta.pkl, which is code and not data: nanoGPT will take {NANOGPT_IDS:,} ids, and here are {ids:,}")
    if ids > NANOGPT_IDS:
        print(f"warning: set meta_vocab_size = {ids} in nanoGPT's train.py", file=sys.stderr)
    return 0


def export(folder: Path, manifest: Manifest, out: Path) -> list[tuple[Path, int]]:
    """Write the splits of a data set into `out`; returns the files, and the tokens in each.

    Raises:
        UserError: ids that uint16 cannot hold, a file that is there already, or a shard that is damaged.
        OSError: a file could not be written. Those that are whole stay.
    """
    highest = max((shard.max_id for shard in manifest.shards), default=0)
    if highest > np.iinfo(np.uint16).max:
        raise UserError(
            f"{folder} has ids up to {highest:,}, and nanoGPT reads uint16, up to 65,535: it can't read this data set. "
            "llm.c and Megatron read these shards as they are"
        )
    splits = [shard_reader.open_split(folder, manifest, name) for name in SPLITS if name in manifest.splits]
    if not splits:
        raise UserError(f"{folder} has neither train nor val shards")
    files = [out / f"{split.name}.bin" for split in splits]
    for path in files:
        if path.exists():
            raise UserError(f"{path} is there already: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    end_of_text = manifest.tokenizer["end_of_text"]
    total = sum(split.tokens for split in splits)
    with tqdm(total=2 * total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        for split, path in zip(splits, files, strict=True):
            with atomic.writing(path) as file:
                for tokens in _moved_behind(split, manifest.width, end_of_text):
                    file.write(tokens.tobytes())
                    bar.update(tokens.nbytes)
    return [(path, split.tokens) for split, path in zip(splits, files, strict=True)]


def _moved_behind(split: Split, width: Width, end_of_text: int) -> Iterator[NDArray[np.uint16]]:
    """The stream with its first token, an end-of-text, at the end instead: so each stands behind its document."""
    for number, shard in enumerate(split.shards):
        for first, tokens in chunked_file.of_shard(split.folder, shard, width):
            at = f"{split.folder / shard.name}.bin, token"
            if tokens.max() > np.iinfo(np.uint16).max:
                raise UserError(f"{at} {first:,} and on: there are ids of which the manifest does not tell")
            begins = number == first == 0
            if begins and tokens[0] != end_of_text:
                raise UserError(f"{at} 0: {tokens[0]}, expected the end-of-text id {end_of_text}")
            yield tokens[begins:].astype("<u2")
    yield np.array([end_of_text], dtype="<u2")


if __name__ == "__main__":
    cli.run(main)
