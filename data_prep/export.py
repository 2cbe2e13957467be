"""Export shards as nanoGPT's files: ``python -m data_prep.export DIR --to nanogpt --out FOLDER``.

FOLDER gets train.bin and val.bin as nanoGPT's prepare.py would write them: uint16 tokens without a header, an
end-of-text id after each document (in shards it is before each). meta.pkl is not written: a pickle can run code when it
is read, and without one nanoGPT assumes 50,304 ids.

llm.c, modded-nanogpt and Megatron read shards as they are, so nothing has to be exported for them.
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
from hpcgpt.output import streams
from hpcgpt.storage import atomic

SPLITS = ("train", "val")
NANOGPT_IDS = 50_304


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.export", description="Shards -> nanoGPT's files.")
    parser.add_argument("DIR", help="folder of shards")
    parser.add_argument("--to", required=True, choices=["nanogpt"])
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for train.bin and val.bin")
    arguments = parser.parse_args(argv)
    folder, out = Path(paths.expand(arguments.DIR, "DIR")), Path(paths.expand(arguments.out, "--out"))
    manifest = shard_format.read_manifest(folder)
    for path, tokens in export(folder, manifest, out):
        eot_id = manifest.tokenizer["end_of_text"]
        print(f"{path}: {tokens:,} tokens as uint16, end-of-text {eot_id} after each document")
    ids = manifest.tokenizer["vocab_size"]
    print(f"no meta.pkl, because a pickle can run code: nanoGPT will assume {NANOGPT_IDS:,} ids; this data has {ids:,}")
    if ids > NANOGPT_IDS:
        streams.warn(f"set meta_vocab_size = {ids} in nanoGPT's train.py")
    return 0


def export(folder: Path, manifest: Manifest, out: Path) -> list[tuple[Path, int]]:
    """Write the splits of a data set into `out`; return the files, and the number of tokens in each.

    Raises:
        UserError: uint16 cannot hold the ids, a file exists already, or a shard is damaged.
        OSError: a file could not be written. Complete files stay.
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
                for tokens in _with_eot_after(split, manifest.width, end_of_text):
                    file.write(tokens.tobytes())
                    bar.update(tokens.nbytes)
    return [(path, split.tokens) for split, path in zip(splits, files, strict=True)]


def _with_eot_after(split: Split, width: Width, end_of_text: int) -> Iterator[NDArray[np.uint16]]:
    """Yield the tokens with the first one, an end-of-text id, moved to the end: so each id is after its document."""
    for number, shard in enumerate(split.shards):
        for first, tokens in chunked_file.shard_chunks(split.folder, shard, width):
            where = f"{split.folder / shard.name}.bin, token"
            if tokens.max() > np.iinfo(np.uint16).max:
                raise UserError(f"{where} {first:,} and on: there are higher ids than the manifest says")
            is_first = number == first == 0
            if is_first and tokens[0] != end_of_text:
                raise UserError(f"{where} 0: {tokens[0]}, expected the end-of-text id {end_of_text}")
            yield tokens[is_first:].astype("<u2")
    yield np.array([end_of_text], dtype="<u2")


if __name__ == "__main__":
    cli.run(main)
