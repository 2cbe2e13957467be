"""``python -m data_prep.verify DIR``: are these shards whole, and what their manifest says?

Checks the manifest's digest, the tokenizer's fingerprint, and of every shard its size, checksums, header,
index, document starts and ids. Exit status 0 if all holds, 1 if not, 2 if there is no data set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from hpcgpt import cli, shards, tokenizer


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
        found += shards.problems(folder, shard, about["vocab_size"], about["end_of_text"])
    return found


if __name__ == "__main__":
    cli.run(main)
