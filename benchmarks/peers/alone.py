"""tiktoken and nothing else: one process, a numpy array a document, kept in memory. With OUT "-" nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import orjson

from peers import gpt2


def main(source: str, out: str, tokenizer: str) -> None:
    encoding = gpt2.encoding(tokenizer)
    found = []
    with open(source, "rb") as file:
        for line in file:
            ids = encoding.encode_ordinary(orjson.loads(line)["text"])
            found.append(np.array([gpt2.END_OF_TEXT, *ids], dtype=np.uint16))
    if out != "-":  # to compare, not to measure
        np.concatenate(found).tofile(Path(out) / "all.bin")


if __name__ == "__main__":
    main(*sys.argv[1:4])
