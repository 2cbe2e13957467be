"""The shard format: write, open, verify.

A data set is a folder::

    train_000000.bin   tokens          val_000000.bin   ...one split is all shards of one name
    train_000000.idx   documents
    tokenizer/         see hpcgpt.tokenizer
    manifest.json      written last: without it there is no data set

**.bin** is what llm.c and modded-nanogpt read: 256 little-endian int32 (magic 20240520, version 1,
token count, zeros), then the tokens as little-endian uint16. Every document starts with the
end-of-text id and lies in one shard.

**.idx** is what Megatron's IndexedDataset reads: ``MMIDIDX\\0\\0``, version as uint64 (1), dtype code as
uint8 (8 is uint16), sequences as uint64, documents + 1 as uint64, then a length in tokens for each
sequence as int32, its place in the .bin in bytes as int64, and the document borders as int64. A
sequence is a document here, and the first place is 1024, behind the .bin's header: so one pair of
files serves all three readers.

**manifest.json** describes each shard (tokens, documents, bytes, SHA-256 of both files, smallest and
largest id, bytes of text), the tokenizer (name, fingerprint, vocabulary size, end-of-text id, what
became of special tokens in the text), the dtype, the inputs and the rule of the split, and ends with
``digest``, the SHA-256 of everything else in it.

numpy and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hpcgpt import durable

HEADER_BYTES = 1024
MAGIC, VERSION = 20240520, 1
IDX_MAGIC, IDX_VERSION, IDX_UINT16 = b"MMIDIDX\x00\x00", 1, 8
LARGEST_VOCABULARY = 1 << 16
MOST_TOKENS = (1 << 31) - 1  # the header counts in int32
FORMAT, FORMAT_VERSION = "hpcgpt-shards", 1

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard. `name` has no suffix; `text_bytes` is UTF-8."""

    name: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    idx_sha256: str
    min_id: int
    max_id: int
    text_bytes: int


@dataclass(frozen=True)
class Manifest:
    dtype: str
    tokenizer: dict[str, Any]
    inputs: list[dict[str, Any]]
    split_rule: str
    shards: list[Shard]
    digest: str

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})


# --- writing ---------------------------------------------------------------------------------------


class ShardWriter:
    """Appends documents to one shard; see `writing`."""

    def __init__(self, bin_file: BinaryIO, name: str, split: str) -> None:
        self._file, self._name, self._split = bin_file, name, split
        self._lengths: list[int] = []
        self._tokens = self._text_bytes = 0
        self._min, self._max = LARGEST_VOCABULARY, -1
        self.shard: Shard | None = None
        bin_file.write(bytes(HEADER_BYTES))

    def add(self, document: Tokens, text_bytes: int) -> None:
        """Append one document (n,) that starts with the end-of-text id and stands for `text_bytes`."""
        if self._tokens + len(document) > MOST_TOKENS:
            raise ValueError(f"{self._name}: a shard holds at most {MOST_TOKENS:,} tokens: use smaller units")
        self._file.write(document.astype("<u2", copy=False).tobytes())
        self._lengths.append(len(document))
        self._tokens += len(document)
        self._text_bytes += text_bytes
        self._min = min(self._min, int(document.min()))
        self._max = max(self._max, int(document.max()))

    def finish(self, idx_file: BinaryIO) -> None:
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSION, self._tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        index = _index(np.array(self._lengths, dtype=np.int64))
        idx_file.write(index)
        self.shard = Shard(
            name=self._name,
            split=self._split,
            tokens=self._tokens,
            documents=len(self._lengths),
            bytes=HEADER_BYTES + 2 * self._tokens,
            sha256=_sha256(Path(self._file.name)),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            min_id=self._min,
            max_id=self._max,
            text_bytes=self._text_bytes,
        )


@contextmanager
def writing(folder: Path, split: str, number: int) -> Iterator[ShardWriter]:
    """A writer whose two files appear, whole, when the block ends well; `writer.shard` describes them.

    Raises:
        OSError: a file could not be written; neither is left behind.
        ValueError: more tokens than the header can count.
    """
    name = f"{split}_{number:06d}"
    with (
        durable.writing(folder / f"{name}.bin") as bin_file,
        durable.writing(folder / f"{name}.idx") as idx_file,
    ):
        writer = ShardWriter(bin_file, name, split)
        yield writer
        writer.finish(idx_file)


def write_manifest(
    folder: Path,
    tokenizer: dict[str, Any],
    inputs: list[dict[str, Any]],
    split_rule: str,
    shards: list[Shard],
) -> Manifest:
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": "uint16",
        "tokenizer": tokenizer,
        "inputs": inputs,
        "split_rule": split_rule,
        "shards": [asdict(shard) for shard in shards],
    }
    body["digest"] = _digest(body)
    durable.write(folder / "manifest.json", (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    return read_manifest(folder)


def _index(lengths: NDArray[np.int64]) -> bytes:
    pointers = HEADER_BYTES + 2 * (np.cumsum(lengths) - lengths)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    head = IDX_MAGIC + struct.pack("<QBQQ", IDX_VERSION, IDX_UINT16, len(lengths), len(documents))
    return head + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes()


def _digest(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- reading ---------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data set.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    path = folder / "manifest.json"
    make = "make one with `python -m data_prep.make_shards INPUT... --out DIR`"
    if not folder.is_dir():
        raise ValueError(f"no folder of shards at {folder}: {make}, or set data.dir")
    if not path.is_file():
        raise ValueError(f"no data set in {folder}: manifest.json, which is written last, is missing; {make}")
    try:
        body = json.loads(path.read_bytes())
        kind = (body["format"], body["version"])
        if kind != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"{path}: format {kind[0]} version {kind[1]}, expected {FORMAT} {FORMAT_VERSION}")
        if body["digest"] != _digest(body):
            raise ValueError(f"{path}: its digest does not fit its content: the file was changed or damaged")
        shards = [Shard(**shard) for shard in body["shards"]]
        return Manifest(body["dtype"], body["tokenizer"], body["inputs"], body["split_rule"], shards, body["digest"])
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a manifest of shards: {error!r}") from None


@dataclass(frozen=True)
class Split:
    """The shards of one split as one long stream of tokens."""

    folder: Path
    name: str
    shards: list[Shard]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Place in the stream of each shard's first token, and the length of the stream (n + 1,)."""
        return np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])]).astype(np.int64)

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _maps(self) -> dict[int, Tokens]:
        return {}

    def read(self, start: int, count: int) -> Tokens:
        """Tokens start ... start + count - 1 of the stream (count,), from as many shards as it takes."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        offset = start - int(self.starts[number])
        part = self._map(number)[offset : offset + count]
        if len(part) == count:
            return part
        return np.concatenate([part, self.read(start + len(part), count - len(part))])

    def where(self, place: int) -> str:
        """The shard and the offset in it of a place in the stream, for messages."""
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        return f"{self.folder / self.shards[number].name}.bin, token {place - int(self.starts[number]):,}"

    def _map(self, number: int) -> Tokens:
        if number not in self._maps:
            self._maps[number] = open_tokens(self.folder / f"{self.shards[number].name}.bin")
        return self._maps[number]


def open_split(folder: Path, manifest: Manifest, name: str) -> Split:
    """One split of a data set, with the size of every shard checked against the manifest.

    Raises:
        ValueError: no such split, or a shard that is missing, truncated or too long.
    """
    shards = [shard for shard in manifest.shards if shard.split == name]
    if not shards:
        there = ", ".join(manifest.splits) or "nothing"
        raise ValueError(f"{folder} has no {name} shards (it has {there})")
    for shard in shards:
        check_size(folder, shard)
    return Split(folder, name, shards)


def check_size(folder: Path, shard: Shard) -> None:
    path = folder / f"{shard.name}.bin"
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise ValueError(f"{path}: the manifest lists it, but it can't be read: {error.strerror}") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "too long"
        raise ValueError(f"{path} is {what}: {size:,} bytes, expected {shard.bytes:,}; make the shards again")


def open_tokens(path: Path) -> Tokens:
    """The tokens of a .bin file as a read-only memory map (n,).

    Raises:
        ValueError: not a token shard, or not of the size that its header tells.
    """
    size = os.stat(path).st_size
    header = np.fromfile(path, dtype="<i4", count=256) if size >= HEADER_BYTES else np.zeros(256, dtype="<i4")
    if header[0] != MAGIC or header[1] != VERSION:
        raise ValueError(f"{path}: not a token shard: header {header[0]}, {header[1]}; expected {MAGIC}, {VERSION}")
    if size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{path}: {size:,} bytes do not fit the {header[2]:,} tokens of its header")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


# --- verifying -------------------------------------------------------------------------------------


def problems(folder: Path, shard: Shard, vocab_size: int, end_of_text: int) -> list[str]:
    """Everything that is wrong with one shard: sizes, checksums, header, ids, index, document starts."""
    bin_path, idx_path = folder / f"{shard.name}.bin", folder / f"{shard.name}.idx"
    try:
        check_size(folder, shard)
        if _sha256(bin_path) != shard.sha256:
            return [f"{bin_path}: its SHA-256 differs from the manifest's: the file was changed or damaged"]
        tokens = open_tokens(bin_path)
        index = idx_path.read_bytes()
    except (ValueError, OSError) as error:
        return [str(error)]
    found = []
    if hashlib.sha256(index).hexdigest() != shard.idx_sha256:
        return [f"{idx_path}: its SHA-256 differs from the manifest's: the file was changed or damaged"]
    lengths = document_lengths(index)
    if index != _index(lengths) or int(lengths.sum()) != len(tokens) or len(lengths) != shard.documents:
        found.append(f"{idx_path}: its documents do not add up to the {len(tokens):,} tokens of the .bin")
    elif not np.all(tokens[np.cumsum(lengths) - lengths] == end_of_text):
        found.append(f"{bin_path}: a document does not start with the end-of-text id {end_of_text}")
    low, high = int(tokens.min()), int(tokens.max())
    if (low, high) != (shard.min_id, shard.max_id):
        found.append(f"{bin_path}: ids {low} to {high}, the manifest says {shard.min_id} to {shard.max_id}")
    if high >= vocab_size:
        found.append(f"{bin_path}: id {high} is outside of the tokenizer's {vocab_size:,} ids")
    return found


def document_lengths(index: bytes) -> NDArray[np.int64]:
    """Tokens of each document in the content of an .idx file (n,)."""
    head = len(IDX_MAGIC) + struct.calcsize("<QBQQ")
    if len(index) < head or not index.startswith(IDX_MAGIC):
        return np.zeros(0, dtype=np.int64)
    count = struct.unpack_from("<QBQQ", index, len(IDX_MAGIC))[2]
    if len(index) < head + 4 * count:
        return np.zeros(0, dtype=np.int64)
    return np.frombuffer(index, dtype="<i4", count=count, offset=head).astype(np.int64)
