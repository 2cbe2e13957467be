"""Make one unit of work: tokenize its documents into shards, in a folder of its own::

    prep/units/000012/
      train_000.bin, .idx ...   shards, see hpcgpt.data.shard_format; a new one is started when one is full
      train.documents           the hash of each document, to find duplicates (only with --dedup)
      record.json               what is in the shards, and what was left out

The folder has a temporary name until everything in it is on the disk. So it exists as a whole or not at all, and two
processes that make the same unit (one of them on a node that Slurm gave up) cannot mix their files. Its content
depends on the plan alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encode.interface import EncodedBatch, Encoder
from data_prep.pipeline import holdout
from data_prep.pipeline.plan import ShardOptions
from data_prep.text import accounting
from data_prep.text.documents import read_with_files
from data_prep.text.inputs import InputFile, Unit
from data_prep.text.options import BadInputSink, Skipped
from hpcgpt.data import shard_writer
from hpcgpt.data.shard_format import Shard, Tokens
from hpcgpt.data.shard_writer import ShardWriter
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.byte_level_bpe import UnencodableError

# Large enough to keep the encoder busy, small enough for the CPU's caches.
BATCH_BYTES = 2 << 20
_FLUSHED_AT_ONCE = 8  # files
# A row per document: its hash in two halves, its number among the unit's documents of its split, and its size.
DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4"), ("characters", "<u4"), ("text_bytes", "<u4")])

ReportProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class UnitRecord:
    """The content of record.json: what a finished unit holds. The names in `shards` are those in its folder.

    Of the bad input it has only how many rows there are and how many inputs they stand for: see `read_skipped`.
    """

    shards: list[Shard]
    too_short: int
    skipped_rows: int
    skipped: int
    counts: dict[str, int] = field(default_factory=dict)  # what else was left out or changed: data_prep.text.accounting


def folder(out: Path, number: int) -> Path:
    return out / "prep" / "units" / f"{number:06d}"


def finished(out: Path) -> set[int]:
    """Return the numbers of the units that are finished, and whose folders the end of the data set has not removed."""
    return {int(name) for name in _names(out) if name.isdecimal()}


def _names(out: Path) -> list[str]:
    """List the folder of the units, which asks an NFS server for its current state; a look for one may not."""
    try:
        return os.listdir(out / "prep" / "units")
    except FileNotFoundError:
        return []


def read_record(out: Path, number: int) -> UnitRecord:
    body = _read(out, number)
    shards = [Shard(**row) for row in body["shards"]]
    skipped = sum(row.get("count", 1) for row in body["skipped"])
    return UnitRecord(shards, body["too_short"], len(body["skipped"]), skipped, body.get("counts", {}))


def read_skipped(out: Path, number: int) -> list[Skipped]:
    """Return the bad input of a finished unit, and its notes on input that was kept in another form."""
    return [Skipped(**row) for row in _read(out, number)["skipped"]]


def _read(out: Path, number: int) -> dict[str, Any]:
    return dict(json.loads((folder(out, number) / "record.json").read_bytes()))


@dataclass(frozen=True)
class PendingUnit:
    """A unit that has been made, but not committed yet."""

    temporary: Path
    final: Path


def make(
    out: Path,
    number: int,
    unit: Unit,
    options: ShardOptions,
    encoder: Encoder,
    plan_hash: str,
    report: ReportProgress,
) -> PendingUnit:
    """Make unit `number`, which is visible after `commit`. `report` is called with text bytes and tokens of each batch.

    Raises:
        UserError: a document cannot be read or encoded, and bad input is not to be skipped.
        OSError: a file could not be written. Then nothing of the unit is left.
    """
    final = folder(out, number)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{number:06d}.{plan_hash}.{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        _fill(temporary, unit, options, options.val_fraction_of(number), encoder, report)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return PendingUnit(temporary, final)


def commit(made: PendingUnit) -> None:
    """Flush a unit to the disk, then rename its folder to its final name.

    Raises:
        OSError: that failed. Then nothing of the unit is left.
    """
    try:
        # At the same time: one after the other, each would wait for a commit of the file system's journal.
        with ThreadPoolExecutor(_FLUSHED_AT_ONCE, "flush") as pool:
            list(pool.map(atomic.flush, made.temporary.iterdir()))
        atomic.sync_folder(made.temporary)
        try:
            made.temporary.rename(made.final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise atomic.with_path_and_free_space(error, made.final) from error
            # Another process has made it meanwhile, with the same bytes.
    finally:
        if made.temporary.exists():
            shutil.rmtree(made.temporary)
    atomic.sync_folder(made.final.parent)


def remove_leftovers(out: Path, numbers: Iterable[int], plan_hash: str) -> None:
    """Remove the temporary folders of processes that were killed while they made one of these units of this plan."""
    ours = set(numbers)
    temporary = re.compile(rf"\.(\d+)\.{plan_hash}\..+\.tmp")
    for name in _names(out):
        found = temporary.fullmatch(name)
        if found and int(found[1]) in ours:
            shutil.rmtree(out / "prep" / "units" / name, ignore_errors=True)


def _fill(
    where: Path, unit: Unit, options: ShardOptions, val_fraction: float, encoder: Encoder, report: ReportProgress
) -> None:
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    too_short = 0
    # It and that of the documents' reader have one limit, because both begin with the same empty list.
    sink = BadInputSink(options.text.on_bad_input, skipped)
    with ExitStack() as stack:
        outputs: dict[str, _SplitOutput] = {}
        for file, text in read_with_files(unit, options.text, skipped, counts):
            if len(text) < options.min_characters:
                too_short += 1
                continue
            content = text.encode()
            digest = holdout.digest(content)
            name = "val" if holdout.is_held_out(digest, val_fraction) else "train"
            if name not in outputs:
                outputs[name] = stack.enter_context(_SplitOutput(where, name, options, encoder, report, sink))
            outputs[name].add(file, text, len(content), digest)
    shards = [asdict(shard) for name in sorted(outputs) for shard in outputs[name].shards]
    counts[accounting.UNKNOWN] += sum(output.unknown for output in outputs.values())
    record = {
        "shards": shards,
        "too_short": too_short,
        "skipped": [asdict(row) for row in skipped],
        "counts": counts,
    }
    with atomic.open_plain(where / "record.json") as written:
        written.write(json.dumps(record, ensure_ascii=False).encode())


@dataclass
class _SplitOutput:
    """Collects the documents of one split into batches, encodes them, and writes them to shards."""

    where: Path
    name: str
    options: ShardOptions
    encoder: Encoder
    report: ReportProgress
    sink: BadInputSink
    shards: list[Shard] = field(default_factory=list)
    unknown: int = 0  # tokens for text that the tokenizer cannot encode
    _files: list[InputFile] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _digests: list[bytes] = field(default_factory=list)
    _rows: list[NDArray[Any]] = field(default_factory=list)
    _pending: int = 0
    _documents: int = 0
    _writer: ShardWriter | None = None
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _SplitOutput:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:  # closes the files if writing the last documents fails
            self._flush()
            self._close()
        if self._rows:
            _write_documents(self.where / f"{self.name}.documents", np.concatenate(self._rows))

    def add(self, file: InputFile, text: str, text_bytes: int, digest: bytes) -> None:
        self._files.append(file)
        self._texts.append(text)
        self._sizes.append(text_bytes)
        self._digests.append(digest)
        self._pending += text_bytes
        if self._pending >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        tokens, lengths = self._encode()
        self._write(tokens, lengths)
        if self.options.dedup and self._texts:
            self._rows.append(self._document_rows())
        self.report(self._pending, len(tokens))
        self._documents += len(self._texts)
        self._pending = 0
        for column in (self._files, self._texts, self._sizes, self._digests):
            column.clear()

    def _encode(self) -> tuple[Tokens, NDArray[np.int64]]:
        """Return the tokens of the batch (n,), each document after an end-of-text id, and their lengths (k,)."""
        try:
            ids, counts = self.encoder.batch(self._texts)
        except UnencodableError:
            ids, counts = self._encode_one_by_one()
        lengths = counts + 1
        starts = np.cumsum(lengths) - lengths
        tokens = np.empty(len(ids) + len(counts), dtype=self.options.width.dtype)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[starts] = False
        tokens[starts] = self.options.tokenizer.end_of_text
        tokens[is_text] = ids
        if self.options.tokenizer.unknown is not None:
            self.unknown += int((ids == self.options.tokenizer.unknown).sum())
        return tokens, lengths

    def _encode_one_by_one(self) -> EncodedBatch:
        """Return the ids of the batch after removing the documents from it that cannot be encoded: they are bad input.

        Raises:
            UserError: there is one, and bad input is not to be skipped.
        """
        parts: list[NDArray[np.uint32]] = []
        kept: list[int] = []
        for number, (file, text) in enumerate(zip(self._files, self._texts, strict=True)):
            try:
                parts.append(self.encoder.batch([text])[0])
                kept.append(number)
            except UnencodableError as error:
                remedy = "shorten its runs of white space, or leave it out: --on-bad-input skip"
                self.sink.report(file.path, file.name, "", error.problem, remedy)
        self._files = [self._files[number] for number in kept]
        self._texts = [self._texts[number] for number in kept]
        self._sizes = [self._sizes[number] for number in kept]
        self._digests = [self._digests[number] for number in kept]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.array([len(part) for part in parts], dtype=np.int64)

    def _write(self, tokens: Tokens, lengths: NDArray[np.int64]) -> None:
        """Write the documents of a batch, starting a new shard when one is full."""
        ends = np.cumsum(lengths)
        first, start = 0, 0
        while first < len(lengths):
            room = self.options.shard_tokens - (self._writer.tokens if self._writer else 0)
            last = int(np.searchsorted(ends, start + room, side="right"))
            if last <= first and self._writer and self._writer.tokens:
                self._close()
                continue
            last = max(last, first + 1)  # a document larger than a shard gets its own
            stop = int(ends[last - 1])
            characters = sum(map(len, self._texts[first:last]))
            self._open().add(tokens[start:stop], lengths[first:last], characters, sum(self._sizes[first:last]))
            first, start = last, stop

    def _open(self) -> ShardWriter:
        if self._writer is None:
            name = f"{self.name}_{len(self.shards):03d}"
            shard = shard_writer.writing(self.where, name, self.name, self.options.width, opened=atomic.open_plain)
            self._writer = self._stack.enter_context(shard)
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._stack.close()
            assert self._writer.shard is not None
            self.shards.append(self._writer.shard)
            self._writer = None

    def _document_rows(self) -> NDArray[Any]:
        """Return a row of DOCUMENT for each document of the batch."""
        rows = np.empty(len(self._texts), dtype=DOCUMENT)
        halves = np.frombuffer(b"".join(self._digests), dtype=">u8").reshape(-1, 2)
        rows["high"], rows["low"] = halves[:, 0], halves[:, 1]
        rows["number"] = np.arange(self._documents, self._documents + len(rows))
        rows["characters"] = [len(text) for text in self._texts]
        rows["text_bytes"] = self._sizes
        return rows


def _write_documents(path: Path, rows: NDArray[Any]) -> None:
    """Write the rows in the order of their hashes, so that any range of hashes is contiguous. The sort is stable."""
    order = np.lexsort((rows["low"], rows["high"]))
    with atomic.open_plain(path) as file:
        file.write(rows[order].tobytes())
