"""Writing shards: tokens and their index, complete or absent. The format is in ``hpcgpt.data.shard_format``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Shard, Tokens, Width
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic


class ShardWriter:
    """Appends documents to one shard; see `writing`."""

    def __init__(self, bin_file: BinaryIO, name: str, split: str, width: Width) -> None:
        self._file, self._name, self._split, self._width = bin_file, name, split, width
        self._lengths: list[NDArray[np.int64]] = []
        self.tokens = self._characters = self._text_bytes = 0
        self._min, self._max = width.most_ids, -1
        self.shard: Shard | None = None
        bin_file.write(bytes(shard_format.HEADER_BYTES))

    def add(self, tokens: Tokens, lengths: NDArray[np.int64], characters: int, text_bytes: int) -> None:
        """Append documents: their concatenated `tokens` (n,), each document starting with the end-of-text id, and their
        `lengths` (k,), which add up to n. `characters` and `text_bytes` are those of their text.

        Raises:
            UserError: more tokens than the header can count, or an id that does not fit the width.
        """
        if not len(tokens):
            return
        if self.tokens + len(tokens) > shard_format.MOST_TOKENS:
            raise UserError(f"{self._name}: a shard holds at most {shard_format.MOST_TOKENS:,} tokens")
        low, high = int(tokens.min()), int(tokens.max())
        if high >= self._width.most_ids:
            raise UserError(f"{self._name}: id {high:,} does not fit {self._width.name}")
        self._file.write(tokens.astype(self._width.dtype, copy=False).data)
        self._lengths.append(lengths)
        self.tokens += len(tokens)
        self._characters += characters
        self._text_bytes += text_bytes
        self._min, self._max = min(self._min, low), max(self._max, high)

    def finish(self, idx_file: BinaryIO) -> None:
        self._file.seek(0)
        self._file.write(shard_format.header(self._width, self.tokens))
        self._file.flush()
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, dtype=np.int64)
        index = shard_format.index(self._width, lengths)
        idx_file.write(index)
        self.shard = Shard(
            name=self._name,
            split=self._split,
            tokens=self.tokens,
            documents=len(lengths),
            bytes=shard_format.HEADER_BYTES + self._width.bytes * self.tokens,
            xxh3=shard_format.checksum(Path(self._file.name)),
            idx_xxh3=xxhash.xxh3_128_hexdigest(index),
            min_id=self._min,
            max_id=self._max,
            characters=self._characters,
            text_bytes=self._text_bytes,
        )


@contextmanager
def writing(
    folder: Path,
    name: str,
    split: str,
    width: Width = shard_format.WIDTHS["uint16"],
    opened: Callable[[Path], AbstractContextManager[BinaryIO]] = atomic.writing,
) -> Iterator[ShardWriter]:
    """A writer of `name`.bin and `name`.idx, which appear, whole, when the block ends well; `writer.shard`
    describes them then. With `opened` atomic.open_plain that is the caller's care.

    Raises:
        OSError: a file could not be written; neither file remains.
        UserError: see `ShardWriter.add`.
    """
    paths, is_written = (folder / f"{name}.idx", folder / f"{name}.bin"), False
    try:
        with opened(paths[0]) as idx_file, opened(paths[1]) as bin_file:
            writer = ShardWriter(bin_file, name, split, width)
            yield writer
            writer.finish(idx_file)
            is_written = True
    except BaseException:
        if is_written:  # one of them may have its name already
            for path in paths:
                with suppress(OSError):
                    path.unlink()
        raise
