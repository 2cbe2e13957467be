"""``python -m data_prep.verify DIR``: are these shards whole, and what their manifest says?

Checks the manifest's digest, the tokenizer's fingerprint, and of every shard its size, checksums, header,
index, document starts and ids. Exit status 0 if all holds, 1 if not, 2 if there is no data set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from hpcgpt import cli, shard_reader, shards, tokenizer
from hpcgpt.shards import Shard, Width


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description="Check a folder of shards.")
    parser.add_argument("DIR", help="folder of shards")
    folder = Path(parser.parse_args(argv).DIR)
    manifest = shards.read_manifest(folder)
    found = verify(folder, manifest)
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        return 1
    tokens = sum(shard.tokens for shard in manifest.shards)
    print(f"{folder}: {len(manifest.shards)} shards, {tokens:,} tokens, all as the manifest says")
    return 0


def verify(folder: Path, manifest: shards.Manifest) -> list[str]:
    """Every problem of a data set, one sentence each."""
    about = manifest.tokenizer
    found: list[str] = []
    try:
        tokenizer.load(folder / "tokenizer", about["fingerprint"])
    except ValueError as error:
        found.append(str(error))
    bar = tqdm(manifest.shards, unit="shard", disable=not sys.stderr.isatty())
    for shard in bar:
        found += problems(folder, shard, manifest.width, about["vocab_size"], about["end_of_text"])
    return found


def problems(folder: Path, shard: Shard, width: Width, vocab_size: int, end_of_text: int) -> list[str]:
    """Everything that is wrong with one shard: sizes, checksums, header, ids, index, document starts."""
    bin_path, idx_path = folder / f"{shard.name}.bin", folder / f"{shard.name}.idx"
    try:
        shard_reader.check_size(folder, shard)
        if shards.checksum(bin_path) != shard.xxh3:
            return [f"{bin_path}: its checksum differs from the manifest's: the file was changed or damaged"]
        tokens = shard_reader.open_tokens(bin_path)
        index = idx_path.read_bytes()
    except (ValueError, OSError) as error:
        return [str(error)]
    found = []
    if xxhash.xxh3_128_hexdigest(index) != shard.idx_xxh3:
        return [f"{idx_path}: its checksum differs from the manifest's: the file was changed or damaged"]
    lengths = shards.document_lengths(index)
    if index != shards.index(width, lengths) or int(lengths.sum()) != len(tokens) or len(lengths) != shard.documents:
        found.append(f"{idx_path}: its documents do not add up to the {len(tokens):,} tokens of the .bin")
    elif not np.all(tokens[np.cumsum(lengths) - lengths] == end_of_text):
        found.append(f"{bin_path}: a document does not start with the end-of-text id {end_of_text}")
    low, high = int(tokens.min()), int(tokens.max())
    if (low, high) != (shard.min_id, shard.max_id):
        found.append(f"{bin_path}: ids {low} to {high}, the manifest says {shard.min_id} to {shard.max_id}")
    if high >= vocab_size:
        found.append(f"{bin_path}: id {high} is outside of the tokenizer's {vocab_size:,} ids")
    return found


if __name__ == "__main__":
    cli.run(main)
