"""Turn other programs' token files into shards: ``python -m data_prep.import_shards --from nanogpt|llmc|megatron``.

``data_prep.token_files.foreign_readers`` reads the files, and ``data_prep.token_files.document_splitter`` splits their
tokens into documents.

The manifest is written last. A run that fails removes what it wrote. One that is killed leaves a folder without a
manifest, which no command accepts as a data set, and which has to be removed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
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
from data_prep.text import accounting, unread
from data_prep.text.options import printable_path
from data_prep.text.unread import UnreadFile
from data_prep.token_files import chunked_file, foreign_readers
from data_prep.token_files.document_splitter import DocumentBatch, DocumentSplitter
from data_prep.token_files.foreign_readers import TokenChunk
from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.data import shard_format, shard_writer
from hpcgpt.data.shard_format import Manifest, Shard, Width
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.storage import atomic
from hpcgpt.tokenizer import find_tokenizer, save_load
from hpcgpt.tokenizer.interface import Tokenizer

VALIDATION = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class ImportOptions:
    """How files of a `kind` are read. `eot_id` is their end-of-text id; unless None, `split` is the split of all."""

    kind: str
    tokenizer: Tokenizer
    eot_id: int
    shard_tokens: int
    split: str | None = None
    allow_uncovered: bool = False

    @property
    def width(self) -> Width:
        narrow = shard_format.WIDTHS["uint16"]
        return narrow if self.tokenizer.vocab_size <= narrow.most_ids else shard_format.WIDTHS["uint32"]

    def splitter(self) -> DocumentSplitter:
        return DocumentSplitter(self.tokenizer, self.width, self.eot_id, self.shard_tokens)


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, its split, and the folder in which it was found, if that was named."""

    path: Path
    split: str
    bytes: int
    folder: Path | None = None


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    tokenizer = find_tokenizer.find(arguments.tokenizer)
    eot_id = tokenizer.end_of_text if arguments.end_of_text is None else arguments.end_of_text
    if eot_id < 0:
        raise UserError(f"--end-of-text {eot_id}: expected an id, 0 or more")
    if not 2 <= arguments.shard_tokens <= shard_format.MOST_TOKENS:
        raise UserError(f"--shard-tokens {arguments.shard_tokens:,}: expected 2 to {shard_format.MOST_TOKENS:,}")
    options = ImportOptions(
        arguments.kind, tokenizer, eot_id, arguments.shard_tokens, arguments.split, arguments.allow_uncovered
    )
    out = Path(paths.expand(arguments.out, "--out"))
    _print_summary(out, make(out, find(arguments.INPUT, options), options), tokenizer)
    return 0


def find(inputs: Sequence[str], options: ImportOptions) -> list[TokenFile]:
    """Find the .bin files that `inputs` name; those of a folder are in the order of their names.

    Raises:
        UserError: there are none, or a file is named twice.
    """
    found: list[Path] = []
    folders: dict[Path, Path] = {}
    for name in inputs:
        path = Path(paths.expand(name, "INPUT"))
        if path.is_dir():
            in_folder = sorted(path.glob("*.bin"))
            if not in_folder:
                raise UserError(f"{path}: no .bin files in this folder")
            found += in_folder
            folders |= dict.fromkeys(in_folder, path)
        elif options.kind == "megatron":
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
        TokenFile(
            path,
            options.split or ("val" if VALIDATION.search(path.stem) else "train"),
            path.stat().st_size,
            folders.get(path),
        )
        for path in found
    ]


def make(out: Path, files: list[TokenFile], options: ImportOptions) -> Manifest:
    """Make the data set `out` from `files`.

    Raises:
        UserError: the folder is not empty, or a file is not what the options say.
        OSError: a file could not be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already, and not empty: choose another --out")
    others = unread_beside(files, options.kind)
    out.mkdir(parents=True, exist_ok=True)
    claim = out / ".importing"
    if not atomic.create(claim, f"{socket.gethostname()} {os.getpid()}\n".encode()):
        raise UserError(f"{out}: another import is writing here")
    made: list[Shard] = []
    counts: Counter[str] = Counter(empty=0)
    size = sum(file.bytes for file in files)
    try:
        for file in files:
            counts["uncovered_bytes"] += _check_covered(file, options) if options.kind == "megatron" else 0
        with tqdm(total=size, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
            for split in ("train", "val"):
                splitter, of_split = options.splitter(), [file.path for file in files if file.split == split]
                _write(out, split, _batches(splitter, _chunks(of_split, options.kind, bar)), splitter, made)
                counts["empty"] += splitter.empty
                counts[accounting.UNKNOWN] += splitter.unknown
                if of_split:
                    _print_split(split, len(of_split), splitter)
                text_tokens = sum(shard.tokens - shard.documents for shard in made if shard.split == split)
                assert text_tokens == splitter.read - splitter.eot_tokens, "a token was lost or made"
        if not made:
            raise UserError("there is not one document in these files")
        save_load.save(options.tokenizer, out / "tokenizer")
        rule = f"everything is {options.split}" if options.split else "val if the file is named so, else train"
        inputs = [
            {"name": printable_path(file.path), "bytes": file.bytes, "format": options.kind, "split": file.split}
            for file in files
        ]
        about = options.tokenizer.describe()
        listed = {key: count for key, count in counts.items() if count or key == "empty"}
        return shard_format.write_manifest(
            out, options.width.name, about, inputs, rule, listed, made, unread=unread.for_manifest(others)
        )
    except BaseException:
        (out / "manifest.json").unlink(missing_ok=True)  # first: without it no file here counts
        for path in (out / f"{shard.name}{suffix}" for shard in made for suffix in (".bin", ".idx")):
            path.unlink(missing_ok=True)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        raise
    finally:
        claim.unlink(missing_ok=True)


def _bin_of(path: Path) -> Path:
    """Return the .bin of a Megatron data set, which is named without a suffix. The name may contain dots."""
    return path if path.suffix == ".bin" else path.with_name(f"{path.name}.bin")


def unread_beside(files: Sequence[TokenFile], kind: str) -> list[UnreadFile]:
    """List the files in the named folders that are not read.

    Raises:
        UserError: one of them says that the tokens are of another tokenizer.
    """
    read = {file.path.resolve() for file in files}
    read |= {path.with_suffix(".idx") for path in read} if kind == "megatron" else set()
    found = []
    if kind == "nanogpt":
        _refuse_meta({file.path.parent for file in files})
    for folder in sorted({file.folder for file in files if file.folder}):
        for path in sorted(folder.iterdir()):
            if path.resolve() not in read:
                # These reasons are part of the manifest's digest.
                reason = "a folder" if path.is_dir() else "hidden" if path.name.startswith(".") else "no tokens to read"
                found.append(UnreadFile(printable_path(path), path.lstat().st_size, reason))
    return found


def _refuse_meta(folders: set[Path]) -> None:
    for path in (folder / "meta.pkl" for folder in sorted(folders)):
        if path.exists():
            raise UserError(
                f"{path} says that nanoGPT's tokens beside it have their own vocabulary, often of single "
                "characters. It is a pickle, which can run code, so it is not read: make shards of the text itself "
                "with `python -m data_prep.make_shards`, or move meta.pkl away if the ids are those of --tokenizer"
            )


def _check_covered(file: TokenFile, options: ImportOptions) -> int:
    """Return how many bytes of a .bin belong to no document of its index; raise UserError if that is not allowed."""
    missing, size = foreign_readers.uncovered(file.path)
    if missing and not options.allow_uncovered:
        raise UserError(
            f"{file.path}: {missing:,} of its {size:,} bytes belong to no document of its .idx: is that the .idx of "
            "another file, or was the .bin extended after it? If those bytes may be left out, say --allow-uncovered"
        )
    return missing


def _print_split(split: str, files: int, splitter: DocumentSplitter) -> None:
    print(
        f"{split:5}  {counted(files, 'file')}, end-of-text {splitter.eot_id} {splitter.convention}; read "
        f"{splitter.read:,} "
        f"tokens, {splitter.read - splitter.eot_tokens:,} of text and {splitter.eot_tokens:,} end-of-text"
    )
    if splitter.eot_tokens and splitter.starts_without_eot:
        streams.warn(
            f"by the index, {splitter.starts_without_eot:,} documents of {split} begin without an end-of-text "
            f"{splitter.eot_id}, though other documents have one: is it the .idx of this .bin?"
        )


def _chunks(files: list[Path], kind: str, bar: Any) -> Iterator[TokenChunk]:
    for path in files:
        for chunk in foreign_readers.READERS[kind](path):
            yield chunk
            bar.update(chunk.tokens.nbytes)


def _batches(splitter: DocumentSplitter, chunks: Iterator[TokenChunk]) -> Iterator[DocumentBatch]:
    """Yield batches of complete documents, none of them empty."""
    batches = chain(map(splitter.add, chunks), (splitter.rest() for _ in range(1)))
    return ((tokens, lengths) for tokens, lengths in batches if len(lengths))


def _write(
    out: Path, split: str, batches: Iterator[DocumentBatch], splitter: DocumentSplitter, made: list[Shard]
) -> None:
    """Write documents into shards of at most `splitter.most` tokens, and append these to `made`."""
    characters, text_bytes = _text_sizes(splitter.tokenizer)
    batch, number = next(batches, None), 0
    while batch is not None:
        with shard_writer.writing(out, f"{split}_{number:06d}", split, splitter.width) as writer:
            while batch is not None:
                tokens, lengths = batch
                room = splitter.most - writer.tokens
                fit = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
                assert fit or writer.tokens, "a document that is longer than a shard"
                stop = int(lengths[:fit].sum())
                fitting = tokens[:stop]
                writer.add(fitting, lengths[:fit], int(characters[fitting].sum()), int(text_bytes[fitting].sum()))
                if fit < len(lengths):
                    batch = tokens[stop:], lengths[fit:]
                    break
                batch = next(batches, None)
        assert writer.shard
        made.append(writer.shard)
        number += 1


def _text_sizes(tokenizer: Tokenizer) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of characters and of UTF-8 bytes of each id's text (vocab_size,).

    A character is counted with the token of its first byte, which is any byte of UTF-8 but 0x80 to 0xBF. If the
    tokenizer is not byte-level, characters of several tokens are not counted.
    """
    characters = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    ranks: dict[bytes, int] | None = getattr(tokenizer, "ranks", None)
    if ranks is not None:
        for token, rank in ranks.items():
            characters[rank] = sum(byte & 0xC0 != 0x80 for byte in token)
    else:
        for rank in np.flatnonzero(tokenizer.token_bytes).tolist():
            characters[rank] = len(inspect.token_text(tokenizer, rank).replace("\ufffd", ""))
    return characters, tokenizer.token_bytes


def _print_summary(out: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        print(
            f"{name:5}  {sum(s.tokens for s in of):,} tokens in {counted(sum(s.documents for s in of), 'document')}, "
            f"{counted(len(of), 'shard')}, end-of-text {tokenizer.end_of_text} before each document"
        )
    if manifest.counts["empty"]:
        print(f"left out: {manifest.counts['empty']:,} empty documents")
    if missing := manifest.counts.get("uncovered_bytes"):
        print(f"left out: {missing:,} bytes that belong to no document of the index")
    accounting.print_changes(manifest)
    with chunked_file.open_file(out / f"{manifest.shards[0].name}.bin") as file:
        first = file.read(manifest.width.dtype, shard_format.HEADER_BYTES, min(40, manifest.shards[0].tokens))
    text = inspect.token_text(tokenizer, *first[1:].tolist())
    print(f"it begins: {text[:60]!r} (if this is not text, the tokens were made with another tokenizer)")
    print(f"{out}: complete (digest {manifest.digest[:12]})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.import_shards", description="Token files of nanoGPT, llm.c or Megatron -> shards."
    )
    parser.add_argument(
        "INPUT",
        nargs="+",
        help="files of tokens, in their order, or folders of .bin files; of Megatron the .bin, the .idx, or the name "
        "without either",
    )
    parser.add_argument(
        "--from",
        dest="kind",
        required=True,
        choices=sorted(foreign_readers.READERS),
        help="which program wrote INPUT; llmc also for modded-nanogpt",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the shards")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer of INPUT: gpt2, a folder, ...")
    parser.add_argument(
        "--end-of-text", type=int, metavar="ID", help="the end-of-text id in INPUT (default: the tokenizer's)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        help="the split of all of INPUT (default: val where a file is named so, else train)",
    )
    parser.add_argument(
        "--allow-uncovered",
        action="store_true",
        help="megatron: leave out bytes of a .bin that belong to no document of its .idx (they are counted)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=100_000_000,
        metavar="N",
        help="at most this many tokens per shard and per document (default: 100,000,000)",
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
