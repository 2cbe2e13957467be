"""data_prep.pipeline.finalize: the memory of the task that finishes last does not grow with the bad input."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from pathlib import Path

import pytest

from data_prep import make_shards, verify
from data_prep.pipeline import finalize, unit
from data_prep.pipeline.plan import PrepPlan
from hpcgpt.data import shard_format


class StoppedError(Exception):
    pass


def test_the_bad_input_of_one_unit_at_a_time_is_in_memory(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve units with a thousand rows each, of which all but the first are written here."""
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbad\n')
    plans: list[PrepPlan] = []

    def stop(_: Path, plan: PrepPlan) -> None:
        plans.append(plan)
        raise StoppedError

    flags = ["--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--workers", "1", "--on-bad-input", "skip"]
    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(finalize, "finalize", stop)
        make_shards.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), *flags])
    plan = dataclasses.replace(plans[0], units=plans[0].units * 12)
    for number in range(1, 12):
        rows = [{"name": f"{number}.jsonl", "place": f"byte {n}", "problem": "x" * 1000, "count": 1 + n % 2}
                for n in range(1000)]  # fmt: skip
        folder = unit.folder(tmp_path / "out", number)
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps({"shards": [], "too_short": 2, "skipped": rows, "counts": {}}))
    tracemalloc.start()
    try:
        made = finalize.finalize(tmp_path / "out", plan)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000
    assert made.counts == {"too_short": 2 * 11, "duplicates": 0, "skipped": 1 + 11 * 1500}
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    names = [f"{number}.jsonl" for number in range(1, 12) for _ in range(1000)]
    assert [row["name"] for row in listed] == ["a.jsonl", *names]
    assert listed[1001]["place"] == "byte 0"
    assert verify.verify(tmp_path / "out", shard_format.read_manifest(tmp_path / "out")) == []
