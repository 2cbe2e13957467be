"""Other programs' token files -> shards: ``python -m data_prep.import_shards --from nanogpt|llmc|megatron``.

What is read is told in ``data_prep.token_files.foreign_readers``, how it is cut into documents in
``data_prep.token_files.document_splitter``.

The manifest comes last. A run that fails takes away what it wrote; one that was killed leaves a folder that no
other command takes for a data set, to be removed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data_prep import inspect
from data_prep.encode import vocabulary
from data_prep.text import accounting, unread
from data_prep.text.options import shown
from data_prep.text.unread import Unread
from data_prep.token_files import chunked_file, foreign_readers
from data_prep.token_files.document_splitter import Documents
from data_prep.token_files.foreign_readers import Piece
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_writer
from hpcgpt.data.shard_format import Manifest, Shard, Tokens, Width
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.interface import Tokenizer

VALIDATION = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """How tokens of a `kind` are read: `marker` is their end-of-text id, `split` is what all of them are, if given."""

    kind: str
    tokenizer: Tokenizer
    marker: int
    shard_tokens: int
    split: str | None = None
    allow_uncovered: bool = False

    @property
    def width(self) -> Width:
        narrow = shard_format.WIDTHS["uint16"]
        return narrow if self.tokenizer.vocab_size <= narrow.most_ids else shard_format.WIDTHS["uint32"]

    def documents(self) -> Documents:
        return Documents(self.tokenizer, self.width, self.marker, self.shard_tokens)


@dataclass(frozen=True)
class Source:
    """A file of tokens, the split that it belongs to, and the folder that was named in its place, if one was."""

    path: Path
    split: str
    bytes: int
    folder: Path | None = None


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    tokens = vocabulary.find(options.tokenizer)
    marker = tokens.end_of_text if options.end_of_text is None else options.end_of_text
    if marker < 0:
        raise UserError(f"--end-of-text {marker}: expected an id, 0 or more")
    if not 2 <= options.shard_tokens <= shard_format.MOST_TOKENS:
        raise UserError(f"--shard-tokens {options.shard_tokens:,}: expected 2 to {shard_format.MOST_TOKENS:,}")
    recipe = Recipe(options.kind, tokens, marker, options.shard_tokens, options.split, options.allow_uncovered)
    out = Path(paths.expand(options.out, "--out"))
    _summary(out, make(out, find(options.INPUT, recipe), recipe), tokens)
    return 0


def find(inputs: Sequence[str], recipe: Recipe) -> list[Source]:
    """The .bin files that `inputs` name, those of folders in the order of their names.

    Raises:
        UserError: there is nothing, or one file twice.
    """
    found: list[Path] = []
    folders: dict[Path, Path] = {}
    for name in inputs:
        path = Path(paths.expand(name, "INPUT"))
        if path.is_dir():
            files = sorted(path.glob("*.bin"))
            if not files:
                raise UserError(f"{path}: no .bin files in this folder")
            found += files
            folders |= dict.fromkeys(files, path)
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
        Source(
            path,
            recipe.split or ("val" if VALIDATION.search(path.stem) else "train"),
            path.stat().st_size,
            folders.get(path),
        )
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
    others = unread_beside(sources, recipe.kind)
    out.mkdir(parents=True, exist_ok=True)
    claim = out / ".importing"
    if not atomic.create(claim, f"{socket.gethostname()} {os.getpid()}\n".encode()):
        raise UserError(f"{out}: another import is writing here")
    made: list[Shard] = []
    counts: Counter[str] = Counter(empty=0)
    size = sum(source.bytes for source in sources)
    try:
        for source in sources:
            counts["uncovered_bytes"] += _check_covered(source, recipe) if recipe.kind == "megatron" else 0
        with tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for split in ("train", "val"):
                documents, files = recipe.documents(), [s.path for s in sources if s.split == split]
                _write(out, split, _blocks(documents, _pieces(files, recipe.kind, bar)), documents, made)
                counts["empty"] += documents.empty
                counts[accounting.UNKNOWN] += documents.unknown
                if files:
                    _tell(split, len(files), documents, recipe.marker)
                of_text = sum(shard.tokens - shard.documents for shard in made if shard.split == split)
                assert of_text == documents.read - documents.marks, "a token was lost or made"
        if not made:
            raise UserError("there is not one document in these files")
        save_load.save(recipe.tokenizer, out / "tokenizer")
        rule = f"everything is {recipe.split}" if recipe.split else "val if the file is named so, else train"
        inputs = [{"name": str(s.path), "bytes": s.bytes, "format": recipe.kind, "split": s.split} for s in sources]
        about = recipe.tokenizer.describe()
        kept = {key: count for key, count in counts.items() if count or key == "empty"}
        return shard_format.write_manifest(
            out, recipe.width.name, about, inputs, rule, kept, made, unread=unread.listed(others)
        )
    except BaseException:
        for path in (out / f"{shard.name}{suffix}" for shard in made for suffix in (".bin", ".idx")):
            path.unlink(missing_ok=True)
        raise
    finally:
        claim.unlink(missing_ok=True)


def _bin_of(path: Path) -> Path:
    """Megatron names a set without its suffix, and such a name may have dots in it."""
    return path if path.suffix == ".bin" else path.with_name(f"{path.name}.bin")


def unread_beside(sources: Sequence[Source], kind: str) -> list[Unread]:
    """What lies in the folders that were named and is not read.

    Raises:
        UserError: one of them says that the tokens are of another tokenizer.
    """
    read = {source.path.resolve() for source in sources}
    read |= {path.with_suffix(".idx") for path in read} if kind == "megatron" else set()
    found = []
    if kind == "nanogpt":
        _refuse_meta({source.path.parent for source in sources})
    for folder in sorted({source.folder for source in sources if source.folder}):
        for path in sorted(folder.iterdir()):
            if path.resolve() not in read:
                reason = "a folder" if path.is_dir() else "hidden" if path.name.startswith(".") else "no tokens to read"
                found.append(Unread(shown(path), path.lstat().st_size, reason))
    return found


def _refuse_meta(folders: set[Path]) -> None:
    for path in (folder / "meta.pkl" for folder in sorted(folders)):
        if path.exists():
            raise UserError(
                f"{path} says that nanoGPT's tokens beside it have a vocabulary of their own, often of single "
                "characters. It is a pickle, which runs code, so it is not read: make shards of the text itself with "
                "`python -m data_prep.make_shards`, or move meta.pkl away if the ids are those of --tokenizer"
            )


def _check_covered(source: Source, recipe: Recipe) -> int:
    """How many bytes of a .bin belong to no document of its index. Raises UserError if that is not allowed."""
    missing, size = foreign_readers.uncovered(source.path)
    if missing and not recipe.allow_uncovered:
        raise UserError(
            f"{source.path}: its .idx gives {missing:,} of its {size:,} bytes to no document: is it the .idx of "
            "another file, or was the .bin written on after it? If those bytes may be left out, say --allow-uncovered"
        )
    return missing


def _tell(split: str, files: int, documents: Documents, marker: int) -> None:
    print(
        f"{split:5}  {files} files, end-of-text {marker} {documents.convention}; read {documents.read:,} tokens, "
        f"{documents.read - documents.marks:,} of text and {documents.marks:,} end-of-text"
    )
    if documents.marks and documents.off_marks:
        print(
            f"warning: the index lets {documents.off_marks:,} documents of {split} begin where no end-of-text {marker} "
            "stands, though there are some: is it the .idx of this .bin?",
            file=sys.stderr,
        )


def _pieces(files: list[Path], kind: str, bar: Any) -> Iterator[Piece]:
    for path in files:
        for piece in foreign_readers.READERS[kind](path):
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
    if missing := manifest.counts.get("uncovered_bytes"):
        print(f"left out: {missing:,} bytes that the index gives to no document")
    all_tokens = sum(shard.tokens for shard in manifest.shards)
    if changed := accounting.changed(manifest.counts, all_tokens):
        print(f"changed: {changed}")
    if manifest.unread:
        print(f"not read: {unread.told(manifest.unread)}")
    if warning := accounting.unknown_warning(manifest.counts, all_tokens):
        print(f"warning: {warning}", file=sys.stderr)
    with chunked_file.opened(out / f"{manifest.shards[0].name}.bin") as file:
        first = file.read(manifest.width.dtype, shard_format.HEADER_BYTES, min(40, manifest.shards[0].tokens))
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
        "--from",
        dest="kind",
        required=True,
        choices=sorted(foreign_readers.READERS),
        help="llmc is modded-nanogpt's, too",
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
        "--allow-uncovered",
        action="store_true",
        help="megatron: leave out bytes of a .bin that its .idx gives to no document (they are counted)",
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
