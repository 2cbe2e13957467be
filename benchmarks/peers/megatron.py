"""Megatron's loop (tools/preprocess_data.py): a pool maps lines of JSON to lists of ids, end-of-document last.

The parent turns each list into an array and appends it to the .bin, a document at a time; the index comes last.
"""

from __future__ import annotations

import multiprocessing
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from peers import gpt2

CHUNK = 32
_encoding: Any


def _start(tokenizer: str) -> None:
    global _encoding
    _encoding = gpt2.encoding(tokenizer)


def _encode(line: bytes) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    ids = _encoding.encode_ordinary(orjson.loads(line)["text"])
    ids.append(gpt2.END_OF_TEXT)
    return {"text": ids}, {"text": [len(ids)]}, len(line)


def main(source: str, out: str, tokenizer: str, workers: str) -> None:
    lengths: list[int] = []
    with (
        open(source, "rb") as lines,
        open(Path(out) / "text_document.bin", "wb") as file,
        multiprocessing.Pool(int(workers), _start, (tokenizer,)) as pool,
    ):
        for document, sentences, _ in pool.imap(_encode, lines, CHUNK):
            file.write(np.array(document["text"], dtype=np.uint16).tobytes(order="C"))
            lengths.extend(sentences["text"])
    sizes = np.array(lengths, dtype=np.int32)
    with open(Path(out) / "text_document.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(sizes) + 1))
        pointers = 2 * (np.cumsum(sizes, dtype=np.int64) - sizes)
        file.write(sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1, dtype=np.int64).tobytes())


if __name__ == "__main__":
    main(*sys.argv[1:5])
