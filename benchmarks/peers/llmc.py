"""llm.c's way (dev/data/fineweb.py): a pool maps documents to uint16 arrays, end-of-text first.

The parent copies them into a buffer of 1e8 tokens, and writes it after a header of 256 int32 when it is full.
Documents run over shards.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from peers import gpt2

SHARD_TOKENS = 100_000_000
CHUNK = 16
_encoding: Any


def _start(tokenizer: str) -> None:
    global _encoding
    _encoding = gpt2.encoding(tokenizer)


def _tokenize(text: str) -> NDArray[np.uint16]:
    ids = [gpt2.END_OF_TEXT]
    ids.extend(_encoding.encode_ordinary(text))
    array = np.array(ids)
    assert (array >= 0).all() and (array < 2**16).all()
    return array.astype(np.uint16)


def _texts(source: str) -> Iterator[str]:
    with open(source, "rb") as file:
        for line in file:
            yield orjson.loads(line)["text"]


def _write(out: str, number: int, tokens: NDArray[np.uint16]) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = 20240520, 1, len(tokens)
    with open(Path(out) / f"shard_{number:06d}.bin", "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.tobytes())


def main(source: str, out: str, tokenizer: str, workers: str) -> None:
    shard = np.empty(SHARD_TOKENS, dtype=np.uint16)
    number = filled = 0
    with multiprocessing.Pool(int(workers), _start, (tokenizer,)) as pool:
        for ids in pool.imap(_tokenize, _texts(source), chunksize=CHUNK):
            while filled + len(ids) > SHARD_TOKENS:
                room = SHARD_TOKENS - filled
                shard[filled:] = ids[:room]
                _write(out, number, shard)
                ids, number, filled = ids[room:], number + 1, 0
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
        if filled:
            _write(out, number, shard[:filled])


if __name__ == "__main__":
    main(*sys.argv[1:5])
