"""hpcgpt.run.blocks and blocks_file: figures of many rows without reading them, the same as from the rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcgpt.run import attempts, blocks, blocks_file, condensed, goodput, records
from hpcgpt.run.blocks import BLOCK, HEADER_BYTES, WIDTH
from hpcgpt.run.metrics_file import MetricsFile
from tests.run.test_condensed import made_run

STORED = "metrics.blocks"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs of some hundred steps be long ones."""
    monkeypatch.setattr(blocks, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(blocks_file, "PIECE_BYTES", 30_000)


def row(step: int, attempt: int = 1, **more: Any) -> dict[str, Any]:
    draw = random.Random(step * 7 + attempt)
    return {
        "step": step, "tokens": step * 100, "time": 1e9 + step, "attempt": attempt, "train/loss": draw.uniform(2, 9),
        "train/lr": 1e-3, "train/grad_norm": draw.uniform(0, 1), "train/tokens_per_s": draw.uniform(1, 5),
        "train/step_s": 0.9, **({"val/loss": 3.0, "val/elapsed_s": 0.05} if step % 500 == 0 else {}), **more,
    }  # fmt: skip


def train(folder: Path, first: int, last: int, attempt: int = 1) -> MetricsFile:
    """Write rows as training does."""
    file = MetricsFile(folder / "metrics.jsonl", first)
    write(file, first, last, attempt)
    return file


def write(file: MetricsFile, first: int, last: int, attempt: int) -> None:
    for step in range(first, last + 1):
        file.append(row(step, attempt))
        file.write_appended()


def stored(folder: Path) -> blocks.Blocks:
    return np.frombuffer((folder / STORED).read_bytes()[HEADER_BYTES:], BLOCK)


def sound(folder: Path) -> int:
    with open(folder / STORED, "rb") as file, open(folder / "metrics.jsonl", "rb") as rows:
        return blocks.sound(file, rows, (folder / "metrics.jsonl").stat().st_size)


def figures(folder: Path) -> tuple[Any, ...]:
    """Return what a report shows, from blocks of any width."""
    parts = list(blocks.parts(folder))
    found = np.concatenate(parts) if parts else blocks.of_rows([])
    curves = [
        (float(np.nanmin(c["low"])), float(np.nanmax(c["high"])), round(float(c["total"].sum()), 6), c["count"].sum())
        for c in (found[name] for name in blocks.CURVES)
    ]
    assert (found["first"][1:] > found["last"][:-1]).all()
    return found["rows"].sum(), found["last"][-1], found["tokens"][-1], curves


def expected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    with monkeypatch.context() as patched:
        patched.setattr(blocks, "WHOLE_BYTES", 1 << 40)
        return figures(folder)


def test_the_blocks_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, 3000).close()
    found = stored(tmp_path)
    assert found["rows"].sum() > 2800
    assert found["rows"].max() == WIDTH
    assert set(found["first"][np.isfinite(found["val_s"])]) == {500, 1000, 1500, 2000, 2500}
    assert sound(tmp_path) == len(found)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for block in found:
        losses = [json.loads(line)["train/loss"] for line in lines[block["first"] - 1 : block["last"]]]
        curve = block["train/loss"]
        assert (curve["low"], curve["high"], curve["count"]) == (min(losses), max(losses), len(losses))
        assert block["end"] == sum(map(len, lines[: block["last"]]))
    assert figures(tmp_path) == expected(tmp_path, monkeypatch)


def test_few_rows_are_read_where_there_are_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, 5000).close()
    monkeypatch.setattr(blocks, "PROBES", 4)
    parsed: list[bytes] = []
    row_of = records.row_of
    monkeypatch.setattr(records, "row_of", lambda line, keys: parsed.append(line) or row_of(line, keys))
    assert figures(tmp_path)[0] == 5000
    assert len(parsed) < 1000


def test_an_attempt_that_repeats_steps_cuts_the_blocks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, 2000).close()
    before = stored(tmp_path)
    file = train(tmp_path, 1501, 1502, 2)
    write(file, 1503, 2600, 2)
    found = stored(tmp_path)
    same = int(np.searchsorted(before["last"], 1500))
    assert found[:same].tobytes() == before[:same].tobytes()
    assert set(found["attempt"][found["last"] > 1500]) == {2}
    file.cut_off(2001)  # a rollback
    write(file, 2001, 2300, 3)
    file.close()
    assert sound(tmp_path) == len(stored(tmp_path))
    assert set(stored(tmp_path)["attempt"][stored(tmp_path)["last"] > 2000]) == {3}
    assert figures(tmp_path) == expected(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "of another format", "torn", "zeros", "other figures", "of an older run", "shifted"]
)
def test_a_file_that_does_not_agree_is_not_believed_and_made_anew(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 1, 3000).close()
    path = tmp_path / STORED
    content, size = path.read_bytes(), BLOCK.itemsize
    middle = HEADER_BYTES + (len(content) - HEADER_BYTES) // size // 2 * size
    damaged = stored(tmp_path).copy()
    damaged["train/loss"]["high"][20:] += 1.0
    changed = {
        "missing": None, "empty": b"", "of another format": b"x" + content[1:], "torn": content[: middle + 100],
        "zeros": content[:middle] + bytes(len(content) - middle), "other figures": content[:HEADER_BYTES]
        + damaged.tobytes(), "of an older run": content, "shifted": content[:middle] + content[middle + size :],
    }[damage]  # fmt: skip
    path.unlink() if changed is None else path.write_bytes(changed)
    if damage == "of an older run":  # a version without blocks trained on, from another step
        rows = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:1200]
        rows += [json.dumps(row(step, 2)).encode() + b"\n" for step in range(1201, 3501)]
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(rows))
    assert figures(tmp_path) == expected(tmp_path, monkeypatch)
    last = records.newest_rows(tmp_path)[-1]["step"]
    train(tmp_path, last + 1, last + 400, 3).close()
    assert figures(tmp_path) == expected(tmp_path, monkeypatch)
    assert sound(tmp_path) == len(stored(tmp_path)) > 40
    assert stored(tmp_path)["last"][-1] > last + 200


@pytest.mark.parametrize("seed", range(8))
def test_goodput_from_blocks_is_that_of_all_rows(tmp_path: Path, seed: int) -> None:
    made_run(tmp_path, seed, 4000)
    events, rows = attempts.read(tmp_path, attempts.TIMING)
    file = MetricsFile(tmp_path / "metrics.jsonl", 10**6)
    for _ in range(len(rows)):
        file.write_appended()
    file.close()
    assert stored(tmp_path)["rows"].sum() > 3400
    few = condensed.timing(tmp_path, events)
    assert len(few) < len(rows) / 3
    for now in (None, rows[-1]["time"] + 7.0):
        one, other = goodput.measure(events, rows, now), goodput.measure(events, few, now)
        for name in ("productive_s", "evaluation_s", "restart_s", "compile_s", "queue_s", "idle_s", "lost_steps"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), abs=1e-6), name
        assert other.save_stall_s == pytest.approx(one.save_stall_s, abs=0.02 * one.total_s)
        assert other.total_s == pytest.approx(one.total_s, abs=1e-6)


def test_damaged_rows_leave_gaps_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, 2000).close()
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[400] = b"damaged\n"
    lines[700] = json.dumps(row(10**17)).encode() + b"\n"
    lines[900] = json.dumps(row(3)).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    (tmp_path / STORED).unlink()
    train(tmp_path, 2001, 2400).close()
    assert figures(tmp_path) == expected(tmp_path, monkeypatch)
    assert figures(tmp_path)[:2] == (2397, 2400)
    assert sound(tmp_path) == len(stored(tmp_path))


def test_a_short_run_has_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WHOLE_BYTES", 16 << 20)
    train(tmp_path, 1, 500).close()
    assert not (tmp_path / STORED).exists()
    assert len(next(blocks.parts(tmp_path))) == 500


def test_a_disk_that_takes_no_blocks_costs_no_row(tmp_path: Path) -> None:
    (tmp_path / STORED).mkdir()
    train(tmp_path, 1, 600).close()
    assert figures(tmp_path)[0] == 600


# --- rows ------------------------------------------------------------------------------------------


def test_every_sound_row_is_read_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "WHOLE_BYTES", 1 << 30)
    monkeypatch.setattr(records, "BLOCK_BYTES", 500)
    lines = [json.dumps({"step": n, "time": float(n), "train/loss": 2.0, "more": 1}) for n in range(1, 101)]
    lines[20] = '{"step": 21, "time": "soon"}'
    lines[30] = "not JSON"
    lines[40] = json.dumps({"step": 10**17, "time": 41.0})  # beyond the last rows
    lines[50] = json.dumps({"step": 3, "time": 51.0})
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 101, "ti')
    parts = list(blocks.parts(tmp_path))
    assert len(parts) > 5
    assert np.concatenate(parts)["last"].tolist() == [n for n in range(1, 101) if n not in (21, 31, 41, 51)]
    assert (parts[0][0]["attempt"], parts[0][0]["train/loss"]["high"]) == (-1, 2.0)


def test_without_a_file_there_are_no_blocks(tmp_path: Path) -> None:
    assert list(blocks.parts(tmp_path)) == []
