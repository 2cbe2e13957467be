"""hpcgpt.run.row_search: rows are found by their step, whatever lies between them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest

from hpcgpt.run import row_search


@pytest.mark.parametrize("seed", range(20))
def test_every_step_is_found_between_damaged_lines(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    path = tmp_path / "metrics.jsonl"
    lines, begins, at = [], {}, 0
    for step in range(1, 200):
        if draw.random() < 0.2:
            bad = draw.choice([b"\0" * draw.randrange(900), b'{"step": 3', b"", b"5", b'{"step": "7"}']) + b"\n"
            lines.append(bad)
            at += len(bad)
        if draw.random() < 0.9:
            begins[step] = at
            lines.append(json.dumps({"step": step, "text": "x" * draw.randrange(300)}).encode() + b"\n")
            at += len(lines[-1])
    path.write_bytes(b"".join(lines))
    with path.open("rb") as file:
        for step in range(202):
            following = [begin for number, begin in begins.items() if number >= step]
            assert row_search.first_from(file, step) == min(following, default=at)
    for step in range(202):
        assert row_search.row_of(path, step).get("step") == (step if step in begins else None)


def test_few_places_of_a_large_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "text": "x" * 300}) + "\n" for step in range(1, 20_001)))
    read_bytes = 0

    class Counting(io.FileIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            nonlocal read_bytes
            line = super().readline(size)
            read_bytes += len(line)
            return line

    with Counting(path) as file:
        row_search.first_from(file, 12_345)
    assert read_bytes < 30_000 < path.stat().st_size / 200
