"""The shard format: the files of a data set, and its manifest.

A data set is a folder::

    train_000000.bin   tokens          val_000000.bin   ...one split is all shards of one name
    train_000000.idx   documents
    tokenizer/         see hpcgpt.tokenizer.save_load
    manifest.json      written last: without it the folder is not a data set

**.bin** is what llm.c and modded-nanogpt read: 256 little-endian int32 (magic, version, token count,
zeros), then the tokens, little-endian. Magic and version determine the width: 20240520 and 1 for uint16,
20240801 and 7 for uint32 (as llm.c stores Llama 3's ids). Every document starts with the end-of-text id,
and is in one shard.

**.idx** is what Megatron's IndexedDataset reads: ``MMIDIDX\\0\\0``, version as uint64 (1), dtype code as
uint8 (8 is uint16; 4 is int32, which holds the same bits as uint32 here, since no id reaches 2**31),
sequences as uint64, documents + 1 as uint64, then for each sequence its length in tokens as int32 and its
offset in the .bin in bytes as int64, and the document borders as int64. A sequence is a document here,
and the first offset is 1024, after the .bin's header: so one pair of files serves all three readers.

**manifest.json** describes each shard (tokens, documents, bytes, XXH3-128 of both files, smallest and
largest id, characters and UTF-8 bytes of text), the tokenizer (name, fingerprint, vocabulary size,
end-of-text id, how special tokens in the text were encoded), the dtype, the inputs and the rule that
divides train and val. It ends with ``digest``, the SHA-256 of everything else in it.

Written by ``hpcgpt.data.shard_writer``, read by ``hpcgpt.data.shard_reader``. No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from hpcgpt.errors import InputError
from hpcgpt.storage import atomic

HEADER_BYTES = 1024
IDX_MAGIC, IDX_VERSION = b"MMIDIDX\x00\x00", 1
MOST_TOKENS = (1 << 31) - 1  # the header counts in int32
FORMAT, FORMAT_VERSION = "hpcgpt-shards", 2

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


@dataclass(frozen=True)
class Width:
    """The width of a token: numpy's name and type, the .bin's magic and version, the .idx's dtype code."""

    name: str
    dtype: str
    bytes: int
    magic: int
    version: int
    idx_code: int
    most_ids: int


WIDTHS = {
    "uint16": Width("uint16", "<u2", 2, 20240520, 1, 8, 1 << 16),
    "uint32": Width("uint32", "<u4", 4, 20240801, 7, 4, 1 << 31),
}


@dataclass(frozen=True)
class Shard:
    """One shard in the manifest. `name` has no suffix; `characters` are code points, `text_bytes` UTF-8 bytes."""

    name: str
    split: str
    tokens: int
    documents: int
    bytes: int
    xxh3: str
    idx_xxh3: str
    min_id: int
    max_id: int
    characters: int
    text_bytes: int


@dataclass(frozen=True)
class Manifest:
    """`counts` says what the preparation left out or changed, by reason: documents too short, duplicates, bad input,
    null, empty, characters replaced, tokens for unknown text; `unread` which files it found and did not read."""

    dtype: str
    tokenizer: dict[str, Any]
    inputs: list[dict[str, Any]]
    split_rule: str
    counts: dict[str, int]
    shards: list[Shard]
    digest: str
    unread: list[dict[str, Any]] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})

    @property
    def width(self) -> Width:
        return WIDTHS[self.dtype]


def write_manifest(
    folder: Path,
    dtype: str,
    tokenizer: dict[str, Any],
    inputs: list[dict[str, Any]],
    split_rule: str,
    counts: dict[str, int],
    shards: list[Shard],
    *,
    unread: Sequence[dict[str, Any]] = (),
) -> Manifest:
    """Write manifest.json, which completes the data set. `unread` is left out if it is empty."""
    body: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtype,
        "tokenizer": tokenizer,
        "inputs": inputs,
        "split_rule": split_rule,
        "counts": counts,
        "shards": [asdict(shard) for shard in shards],
    }
    if unread:
        body["unread"] = list(unread)
    body["digest"] = _digest(body)
    atomic.write(folder / "manifest.json", (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data set.

    Raises:
        InputError: there is none, or it is damaged or of another format.
    """
    path = folder / "manifest.json"
    make = "make one with `python -m data_prep.make_shards INPUT... --out DIR`"
    if not folder.is_dir():
        raise InputError(f"no folder of shards at {folder}: {make}, or set data.dir")
    if not path.is_file():
        raise InputError(f"no data set in {folder}: manifest.json, which is written last, is missing; {make}")
    try:
        body = json.loads(path.read_bytes())
        kind = (body["format"], body["version"])
        if kind != (FORMAT, FORMAT_VERSION):
            raise InputError(
                f"{path}: format {kind[0]} version {kind[1]}, expected {FORMAT} {FORMAT_VERSION}: make the shards again"
            )
        if body["digest"] != _digest(body):
            raise InputError(f"{path}: its digest does not fit its content: the file was changed or damaged")
        if body["dtype"] not in WIDTHS:
            raise InputError(f"{path}: tokens are {body['dtype']}, expected {' or '.join(WIDTHS)}")
        shards = [Shard(**shard) for shard in body["shards"]]
        fields = {key: body[key] for key in ("dtype", "tokenizer", "inputs", "split_rule", "counts", "digest")}
        return Manifest(**fields, shards=shards, unread=body.get("unread", []))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest of shards: {error!r}") from None


def header(width: Width, tokens: int) -> bytes:
    """Return the first 1024 bytes of a .bin."""
    numbers = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    numbers[:3] = width.magic, width.version, tokens
    return numbers.tobytes()


def index(width: Width, lengths: NDArray[np.int64]) -> bytes:
    """Return the content of the .idx for documents of these `lengths` in tokens (n,)."""
    pointers = HEADER_BYTES + width.bytes * (np.cumsum(lengths) - lengths)
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    head = IDX_MAGIC + struct.pack("<QBQQ", IDX_VERSION, width.idx_code, len(lengths), len(documents))
    return head + lengths.astype("<i4").tobytes() + pointers.astype("<i8").tobytes() + documents.tobytes()


def document_lengths(content: bytes) -> NDArray[np.int64]:
    """Return the tokens of each document from the content of an .idx file (n,); empty if it is not one."""
    head = len(IDX_MAGIC) + struct.calcsize("<QBQQ")
    if len(content) < head or not content.startswith(IDX_MAGIC):
        return np.zeros(0, dtype=np.int64)
    count = struct.unpack_from("<QBQQ", content, len(IDX_MAGIC))[2]
    if len(content) < head + 4 * count:
        return np.zeros(0, dtype=np.int64)
    return np.frombuffer(content, dtype="<i4", count=count, offset=head).astype(np.int64)


def checksum(path: Path) -> str:
    """Return the XXH3-128 of a file, as `xxhsum -H128` prints it."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(1 << 20))
    # Read, not mapped: a map would count as memory of this process.
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _digest(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
