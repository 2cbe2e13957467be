"""litdata: `optimize` over byte ranges of INPUT with tiktoken, for a TokensLoader.

Runs in an environment of its own, and with a TMPDIR of its own, since `optimize` empties the folders data and
chunks in there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import orjson

from peers import gpt2

RANGES = 64
_encodings: dict[str, Any] = {}


def tokenize(piece: tuple[int, int], source: str, tokenizer: str) -> Iterator[np.ndarray]:
    """The documents whose lines start in the range."""
    if tokenizer not in _encodings:
        _encodings[tokenizer] = gpt2.encoding(tokenizer)
    start, stop = piece
    with open(source, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()
        while file.tell() < stop:
            ids = _encodings[tokenizer].encode_ordinary(orjson.loads(file.readline())["text"])
            yield np.array([*ids, gpt2.END_OF_TEXT], dtype=np.uint16)


def main(source: str, out: str, tokenizer: str, workers: str) -> None:
    size = Path(source).stat().st_size
    borders = [size * n // RANGES for n in range(RANGES + 1)]
    litdata.optimize(
        fn=partial(tokenize, source=source, tokenizer=tokenizer),
        inputs=list(pairwise(borders)),
        output_dir=out,
        chunk_bytes="64MB",
        item_loader=litdata.TokensLoader(),
        num_workers=int(workers),
        reorder_files=False,
        verbose=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:5])
