"""One unit of work: its documents, tokenised, in a folder of its own.

    prep/units/000012/
      train_000.bin, .idx ...   shards, see hpcgpt.data.shard_format; the next begins where one is full
      train.documents           of each document its hash, for finding duplicates (only with --dedup)
      record.json               what is in the shards, and what was left out

The folder is made under a temporary name and renamed when everything in it is on the disk: so it is
there, whole, or not at all, and two processes that make the same unit (one of them on a node that was
given up) cannot mix their work. What is in it depends on the plan alone.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.encode.find_tokenizer import Encoder
from data_prep.pipeline import holdout
from data_prep.pipeline.plan import Recipe
from data_prep.text import accounting
from data_prep.text.documents import documents
from data_prep.text.inputs import Unit
from data_prep.text.options import Skipped
from hpcgpt.data import shard_writer
from hpcgpt.data.shard_format import Shard, Tokens
from hpcgpt.data.shard_writer import ShardWriter
from hpcgpt.storage import atomic

# Enough to keep the encoder busy, little enough to stay in the caches of the processor.
BATCH_BYTES = 2 << 20
# Of a document: its hash in two halves, its place among the unit's documents of its split, and its size.
DOCUMENT = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u4"), ("characters", "<u4"), ("text_bytes", "<u4")])

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Record:
    """What a finished unit holds; the names in `shards` are those in its folder."""

    shards: list[Shard]
    too_short: int
    skipped: list[Skipped]
    counts: dict[str, int] = field(default_factory=dict)  # what else was left out or changed, see accounting


def folder(out: Path, number: int) -> Path:
    return out / "prep" / "units" / f"{number:06d}"


def read_record(out: Path, number: int) -> Record:
    body = json.loads((folder(out, number) / "record.json").read_bytes())
    skipped = [Skipped(**row) for row in body["skipped"]]
    return Record([Shard(**row) for row in body["shards"]], body["too_short"], skipped, body.get("counts", {}))


@dataclass(frozen=True)
class Made:
    """A unit that is made, but may not be on the disk yet."""

    temporary: Path
    whole: Path


def make(out: Path, number: int, unit: Unit, recipe: Recipe, encoder: Encoder, mark: str, progress: Progress) -> Made:
    """Make unit `number`, which is there when `keep` has ended well. `progress` is told of text bytes and tokens as
    they come.

    Raises:
        UserError: a document cannot be read.
        OSError: a file could not be written. Nothing of the unit is left then.
    """
    whole = folder(out, number)
    whole.parent.mkdir(parents=True, exist_ok=True)
    temporary = whole.with_name(f".{number:06d}.{mark}.{socket.gethostname()}-{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        _fill(temporary, unit, recipe, encoder, progress)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return Made(temporary, whole)


def keep(made: Made) -> None:
    """Flush a unit to the disk, and give it its name.

    Raises:
        OSError: that failed. Nothing of the unit is left then.
    """
    try:
        for path in made.temporary.iterdir():
            atomic.flush(path)
        atomic.sync_folder(made.temporary)
        try:
            made.temporary.rename(made.whole)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise atomic.with_path_and_free_space(error, made.whole) from error
            # Somebody else made it: the same bytes.
    finally:
        if made.temporary.exists():
            shutil.rmtree(made.temporary)
    atomic.sync_folder(made.whole.parent)


def remove_leftovers(out: Path, number: int, mark: str) -> None:
    """Remove what killed makers of this unit, of this plan, left behind."""
    for path in folder(out, number).parent.glob(f".{number:06d}.{mark}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _fill(where: Path, unit: Unit, recipe: Recipe, encoder: Encoder, progress: Progress) -> None:
    skipped: list[Skipped] = []
    counts: Counter[str] = Counter()
    too_short = 0
    with ExitStack() as stack:
        outputs: dict[str, _SplitOutput] = {}
        for text in documents(unit, recipe.reading, skipped, counts):
            if len(text) < recipe.min_characters:
                too_short += 1
                continue
            content = text.encode()
            digest = holdout.digest(content)
            name = "val" if holdout.below(digest, recipe.val_fraction) else "train"
            if name not in outputs:
                outputs[name] = stack.enter_context(_SplitOutput(where, name, recipe, encoder, progress))
            outputs[name].add(text, len(content), digest)
    shards = [asdict(shard) for name in sorted(outputs) for shard in outputs[name].shards]
    counts[accounting.UNKNOWN] += sum(output.unknown for output in outputs.values())
    record = {
        "shards": shards,
        "too_short": too_short,
        "skipped": [asdict(row) for row in skipped],
        "counts": counts,
    }
    with atomic.open_plain(where / "record.json") as file:
        file.write(json.dumps(record, ensure_ascii=False).encode())


@dataclass
class _SplitOutput:
    """The documents of one split, gathered into batches, encoded, and written to as many shards as they fill."""

    where: Path
    name: str
    recipe: Recipe
    encoder: Encoder
    progress: Progress
    shards: list[Shard] = field(default_factory=list)
    unknown: int = 0  # tokens for text that the tokenizer does not know
    _texts: list[str] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)
    _digests: list[bytes] = field(default_factory=list)
    _seen: list[NDArray[Any]] = field(default_factory=list)
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
        with self._stack:  # which closes the files if writing the last documents fails
            self._flush()
            self._close()
        if self.recipe.dedup:
            _write_documents(self.where / f"{self.name}.documents", np.concatenate(self._seen))

    def add(self, text: str, text_bytes: int, digest: bytes) -> None:
        self._texts.append(text)
        self._sizes.append(text_bytes)
        self._digests.append(digest)
        self._pending += text_bytes
        if self._pending >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._texts:
            return
        tokens, lengths = self._encoded()
        self._write(tokens, lengths)
        if self.recipe.dedup:
            self._seen.append(self._described())
        self.progress(self._pending, len(tokens))
        self._documents += len(self._texts)
        self._pending = 0
        for column in (self._texts, self._sizes, self._digests):
            column.clear()

    def _encoded(self) -> tuple[Tokens, NDArray[np.int64]]:
        """The batch, each document with the end-of-text id before it."""
        ids, counts = self.encoder.batch(self._texts)
        lengths = counts + 1
        starts = np.cumsum(lengths) - lengths
        tokens = np.empty(len(ids) + len(counts), dtype=self.recipe.width.dtype)
        text = np.ones(len(tokens), dtype=bool)
        text[starts] = False
        tokens[starts] = self.recipe.tokenizer.end_of_text
        tokens[text] = ids
        if self.recipe.tokenizer.unknown is not None:
            self.unknown += int((ids == self.recipe.tokenizer.unknown).sum())
        return tokens, lengths

    def _write(self, tokens: Tokens, lengths: NDArray[np.int64]) -> None:
        """Write the documents of a batch, into another shard when one is full."""
        ends = np.cumsum(lengths)
        first, start = 0, 0
        while first < len(lengths):
            room = self.recipe.shard_tokens - (self._writer.tokens if self._writer else 0)
            last = int(np.searchsorted(ends, start + room, side="right"))
            if last <= first and self._writer and self._writer.tokens:
                self._close()
                continue
            last = max(last, first + 1)  # a document larger than a shard has one of its own
            stop = int(ends[last - 1])
            characters = sum(map(len, self._texts[first:last]))
            self._open().add(tokens[start:stop], lengths[first:last], characters, sum(self._sizes[first:last]))
            first, start = last, stop

    def _open(self) -> ShardWriter:
        if self._writer is None:
            name = f"{self.name}_{len(self.shards):03d}"
            shard = shard_writer.writing(self.where, name, self.name, self.recipe.width, opened=atomic.open_plain)
            self._writer = self._stack.enter_context(shard)
        return self._writer

    def _close(self) -> None:
        if self._writer is not None:
            self._stack.close()
            assert self._writer.shard is not None
            self.shards.append(self._writer.shard)
            self._writer = None

    def _described(self) -> NDArray[Any]:
        """A row of DOCUMENT for each document of the batch."""
        rows = np.empty(len(self._texts), dtype=DOCUMENT)
        halves = np.frombuffer(b"".join(self._digests), dtype=">u8").reshape(-1, 2)
        rows["high"], rows["low"] = halves[:, 0], halves[:, 1]
        rows["number"] = np.arange(self._documents, self._documents + len(rows))
        rows["characters"] = [len(text) for text in self._texts]
        rows["text_bytes"] = self._sizes
        return rows


def _write_documents(path: Path, rows: NDArray[Any]) -> None:
    """In the order of their hashes: so those of any range of hashes lie together. Equal ones stay in order."""
    order = np.lexsort((rows["low"], rows["high"]))
    with atomic.open_plain(path) as file:
        file.write(rows[order].tobytes())
