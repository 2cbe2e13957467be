"""nanoGPT's way (data/openwebtext/prepare.py): every document becomes a list of ids, end-of-text last.

Then the lists are concatenated, in 1,024 batches, into a np.memmap of uint16. nanoGPT maps with the `datasets`
library, which keeps the lists in an Arrow file; here a pool returns them to the parent, which keeps arrays.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from peers import gpt2

BATCHES = 1024
CHUNK = 64
_encoding: Any


def _start(tokenizer: str) -> None:
    global _encoding
    _encoding = gpt2.encoding(tokenizer)


def _process(text: str) -> dict[str, Any]:
    ids = _encoding.encode_ordinary(text)
    ids.append(gpt2.END_OF_TEXT)
    return {"ids": ids, "len": len(ids)}


def _texts(source: str) -> Iterator[str]:
    with open(source, "rb") as file:
        for line in file:
            yield orjson.loads(line)["text"]


def main(source: str, out: str, tokenizer: str, workers: str) -> None:
    with multiprocessing.Pool(int(workers), _start, (tokenizer,)) as pool:
        rows = pool.imap(_process, _texts(source), chunksize=CHUNK)
        kept = [(np.array(row["ids"], dtype=np.int32), row["len"]) for row in rows]
    total = sum(length for _, length in kept)
    array = np.memmap(Path(out) / "train.bin", dtype=np.uint16, mode="w+", shape=(total,))
    place = 0
    for batch in range(BATCHES):
        part = [ids for ids, _ in kept[batch * len(kept) // BATCHES : (batch + 1) * len(kept) // BATCHES]]
        if part:
            ids = np.concatenate(part)
            array[place : place + len(ids)] = ids
            place += len(ids)
    array.flush()


if __name__ == "__main__":
    main(*sys.argv[1:5])
