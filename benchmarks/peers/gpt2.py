"""The encoder that all peers share: tiktoken's, of the ranks in a file, as `tiktoken.get_encoding("gpt2")` makes it."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import tiktoken


def encoding(folder: str) -> tiktoken.Encoding:
    about = json.loads((Path(folder) / "tokenizer.json").read_bytes())
    lines = (Path(folder) / "vocab.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    return tiktoken.Encoding(
        "gpt2", pat_str=about["pattern"], mergeable_ranks=ranks, special_tokens=about["special_tokens"]
    )


END_OF_TEXT = 50256
