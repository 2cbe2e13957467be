"""Other programs' token files -> shards: ``python -m data_prep.import_shards --from nanogpt|llmc|megatron``.

What is read is told in ``data_prep.foreign``, how it is cut into documents in ``data_prep.cutting``.

The manifest comes last. A run that fails takes away what it wrote; one that was killed leaves a folder that no
other command takes for a data set, to be removed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep import foreign, inspect, pieces, vocabulary
from data_prep.cutting import Documents
from data_prep.foreign import Piece
from hpcgpt import cli, durable, shard_writer, shards, tokenizer
from hpcgpt.errors import UserError
from hpcgpt.shards import Manifest, Shard, Tokens, Width
from hpcgpt.tokenizer import Tokenizer

VALIDATION = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """How tokens of a `kind` are read: `marker` is their end-of-text id, `split` is what all of them are, if given."""

    kind: str
    tokenizer: Tokenizer
    marker: int
    shard_tokens: int
    split: str | None = None

    @property
    def width(self) -> Width:
        narrow = shards.WIDTHS["uint16"]
        return narrow if self.tokenizer.vocab_size <= narrow.most_ids else shards.WIDTHS["uint32"]

    def documents(self) -> Documents:
        return Documents(self.tokenizer, self.width, self.marker, self.shard_tokens)


@dataclass(frozen=True)
class Source:
    """A file of tokens, and the split that it belongs to."""

    path: Path
    split: str
    bytes: int


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    tokens = vocabulary.find(options.tokenizer)
    marker = tokens.end_of_text if options.end_of_text is None else options.end_of_text
    if marker < 0:
        raise UserError(f"--end-of-text {marker}: expected an id, 0 or more")
    if not 2 <= options.shard_tokens <= shards.MOST_TOKENS:
        raise UserError(f"--shard-tokens {options.shard_tokens:,}: expected 2 to {shards.MOST_TOKENS:,}")
    recipe = Recipe(options.kind, tokens, marker, options.shard_tokens, options.split)
    out = Path(options.out)
    _summary(out, make(out, find(options.INPUT, recipe), recipe), tokens)
    return 0


def find(inputs: Sequence[str], recipe: Recipe) -> list[Source]:
    """The .bin files that `inputs` name, those of folders in the order of their names.

    Raises:
        UserError: there is nothing, or one file twice.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = sorted(path.glob("*.bin"))
            if not files:
                raise UserError(f"{path}: no .bin files in this folder")
            found += files
        elif recipe.kind == "megatron":
            found.append(path.with_suffix(".bin") if path.suffix == ".idx" else _bin_of(path))
        else:
            found.append(path)
    seen: set[Path] = set()
    for path in found:
        if not path.exists():
            raise UserError(f"{path}: no such file")
        if path.resolve() in seen:
            raise UserError(f"{path} is named twice")
        seen.add(path.resolve())
    return [
        Source(path, recipe.split or ("val" if VALIDATION.search(path.stem) else "train"), path.stat().st_size)
        for path in found
    ]


def make(out: Path, sources: list[Source], recipe: Recipe) -> Manifest:
    """Make the data set `out` from `sources`.

    Raises:
        UserError: the folder is not empty, or a file is not what the recipe says.
        OSError: a file could not be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already, and not empty: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    claim = out / ".importing"
    if not durable.create(claim, f"{socket.gethostname()} {os.getpid()}\n".encode()):
        raise UserError(f"{out}: another import is writing here")
    made: list[Shard] = []
    empty = 0
    size = sum(source.bytes for source in sources)
    try:
        with tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for split in ("train", "val"):
                documents, paths = recipe.documents(), [s.path for s in sources if s.split == split]
                _write(out, split, _blocks(documents, _pieces(paths, recipe.kind, bar)), documents, made)
                empty += documents.empty
                if paths:
                    print(f"{split:5}  {len(paths)} files, end-of-text {recipe.marker} {documents.convention}")
        if not made:
            raise UserError("there is not one document in these files")
        tokenizer.save(recipe.tokenizer, out / "tokenizer")
        rule = f"everything is {recipe.split}" if recipe.split else "val if the file is named so, else train"
        inputs = [{"name": str(s.path), "bytes": s.bytes, "format": recipe.kind, "split": s.split} for s in sources]
        about = recipe.tokenizer.describe()
        return shards.write_manifest(out, recipe.width.name, about, inputs, rule, {"empty": empty}, made)
    except BaseException:
        for path in (out / f"{shard.name}{suffix}" for shard in made for suffix in (".bin", ".idx")):
            path.unlink(missing_ok=True)
        raise
    finally:
        claim.unlink(missing_ok=True)


def _bin_of(path: Path) -> Path:
    """Megatron names a set without its suffix, and such a name may have dots in it."""
    return path if path.suffix == ".bin" else path.with_name(f"{path.name}.bin")


def _pieces(paths: list[Path], kind: str, bar: Any) -> Iterator[Piece]:
    for path in paths:
        for piece in foreign.READERS[kind](path):
            yield piece
            bar.update(piece.tokens.nbytes)


def _blocks(documents: Documents, pieces: Iterator[Piece]) -> Iterator[tuple[Tokens, NDArray[np.int64]]]:
    """Whole documents, some at a time, never none."""
    blocks = chain(map(documents.add, pieces), (documents.rest() for _ in range(1)))
    return ((tokens, lengths) for tokens, lengths in blocks if len(lengths))


def _write(
    out: Path,
    split: str,
    blocks: Iterator[tuple[Tokens, NDArray[np.int64]]],
    documents: Documents,
    made: list[Shard],
) -> None:
    """Write documents into shards of `documents.most` tokens at most, and append what they are to `made`."""
    characters, text_bytes = _tables(documents.tokenizer)
    block, number = next(blocks, None), 0
    while block is not None:
        with shard_writer.writing(out, f"{split}_{number:06d}", split, documents.width) as writer:
            while block is not None:
                tokens, lengths = block
                room = documents.most - writer.tokens
                fit = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
                assert fit or writer.tokens, "a document that is longer than a shard"
                stop = int(lengths[:fit].sum())
                now = tokens[:stop]
                writer.add(now, lengths[:fit], int(characters[now].sum()), int(text_bytes[now].sum()))
                if fit < len(lengths):
                    block = tokens[stop:], lengths[fit:]
                    break
                block = next(blocks, None)
        assert writer.shard
        made.append(writer.shard)
        number += 1


def _tables(tokens: Tokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Characters and bytes of text that each id stands for (vocab_size,).

    A character counts where it begins: every byte of UTF-8 begins one but those from 0x80 to 0xBF. Of a tokenizer
    that is not made of bytes, characters that are several tokens are not counted.
    """
    characters = np.zeros(tokens.vocab_size, dtype=np.int64)
    ranks: dict[bytes, int] | None = getattr(tokens, "ranks", None)
    if ranks is not None:
        for token, rank in ranks.items():
            characters[rank] = sum(byte & 0xC0 != 0x80 for byte in token)
    else:
        for rank in np.flatnonzero(tokens.token_bytes).tolist():
            characters[rank] = len(inspect.token_text(tokens, rank).replace("\ufffd", ""))
    return characters, tokens.token_bytes


def _summary(out: Path, manifest: Manifest, tokens: Tokenizer) -> None:
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        print(
            f"{name:5}  {sum(s.tokens for s in of):,} tokens in {sum(s.documents for s in of):,} documents, "
            f"{len(of)} shards, end-of-text {tokens.end_of_text} before each document"
        )
    if manifest.counts["empty"]:
        print(f"left out: {manifest.counts['empty']:,} documents with nothing in them")
    with pieces.opened(out / f"{manifest.shards[0].name}.bin") as file:
        first = file.read(manifest.width.dtype, shards.HEADER_BYTES, min(40, manifest.shards[0].tokens))
    text = inspect.token_text(tokens, *first[1:].tolist())
    print(f"it begins: {text[:60]!r} (if that is no text, the tokens were made with another tokenizer)")
    print(f"{out}: complete (digest {manifest.digest[:12]})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.import_shards", description="Token files of nanoGPT, llm.c or Megatron -> shards."
    )
    parser.add_argument(
        "INPUT",
        nargs="+",
        help="files of tokens, in their order, or folders of .bin files; Megatron's by the name of .bin, .idx or both",
    )
    parser.add_argument(
        "--from", dest="kind", required=True, choices=sorted(foreign.READERS), help="llmc is modded-nanogpt's, too"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the shards")
    parser.add_argument("--tokenizer", required=True, help="what the tokens were made with: gpt2, or a folder")
    parser.add_argument(
        "--end-of-text", type=int, metavar="ID", help="the end-of-text id in INPUT (default: the tokenizer's)"
    )
    parser.add_argument(
        "--split", choices=("train", "val"), help="what INPUT is (default: val where a file is named so, else train)"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens a shard, and a document, at most (default: 100,000,000)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
