"""hpcgpt.run.records: no line of events.jsonl or metrics.jsonl, however damaged, ends one of their readers."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.run import attempts, goodput, records, run_folder
from hpcgpt.slurm import restart_history
from hpcgpt.status import as_text, run_status, table, view, why

NOW = 10_000.0
WRONG: list[Any] = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 1e300, 10**30, -(10**400), "", "7", "\ud800", "\x1b[31m", [],
    {}, [None], ["n1", 3], {"a": 1},
]  # fmt: skip
# Each wrong value in every place, or in one place of six.
SHARES = [6, pytest.param(1, marks=pytest.mark.long)]


def complete_run() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return events of every kind, with every field, and rows."""
    first, second = {"attempt": 1, "job": "7_0"}, {"attempt": 2, "job": "7_1"}
    events: list[tuple[float, str, dict[str, Any]]] = [
        (100, "job", {"job": "7_0", "queued_at": NOW - 900, "started_at": NOW - 850, "hosts": ["n1", "n2"]}),
        (110, "start", first | {"step": 0, "total_steps": 20, "world_size": 2, "host": "n1", "hosts": ["n1", "n2"],
                                "began_at": NOW - 895, "lost_steps": 0, "lost_s": 0, "lost_until": None}),
        (111, "ready", {"attempt": 1, "step": 0, "imports_s": 1, "meet_s": 1, "warm_up_s": 0.5, "load_s": 0.25}),
        (114, "save", {"attempt": 1, "step": 4, "seconds": 1.0, "stall_s": 0.1, "bytes": 10}),
        (115, "save_stall", {"attempt": 1, "step": 4, "stall_s": 0.1}),
        (116, "save_failed", {"attempt": 1, "step": 6, "problem": "no room", "stall_s": 0.1}),
        (117, "straggler", {"attempt": 1, "step": 6, "rank": 1, "host": "n2", "local_s": 2.0, "usual_s": 1.0,
                            "factor": 2.0}),
        (118, "rollback", {"attempt": 1, "step": 4, "spiked_step": 6, "loss": 9.0, "lost_steps": 2, "since": NOW - 885,
                           "skipped_batches": 2}),
        (119, "hang", {"attempt": 1, "step": 6, "rank": 1, "host": "n2", "silent_s": 90.0}),
        (120, "crash", {"job": "7_0", "status": 1, "reason": "crash 1", "rank": 1, "host": "n2", "excluded": ["n2"]}),
        (121, "requeue", {"job": "7_0", "reason": "crash 1"}),
        (130, "job", {"job": "7_1", "queued_at": NOW - 879, "started_at": NOW - 871, "hosts": ["n1"]}),
        (135, "start", second | {"step": 4, "total_steps": 20, "world_size": 2, "hosts": ["n1"], "lost_steps": 2,
                                 "lost_s": 2.0, "lost_until": NOW - 884, "began_at": NOW - 868}),
        (140, "straggler", {"attempt": 2, "step": 6, "rank": 1, "host": "n2", "factor": 2.0}),
        (145, "stop", {"attempt": 2, "step": 9, "reason": "the time limit is near"}),
        (146, "end", {"attempt": 2, "status": 75, "step": 9, "reason": "the time limit is near"}),
        (147, "chain", {"job": "7_1", "next_job": "8", "reason": "saved"}),
        (150, "job", {"job": "8_0"}),
        (151, "no_requeue", {"job": "8_0", "reason": "the job was cancelled"}),
    ]  # fmt: skip
    recorded = [{"time": NOW - 1000 + ago, "event": name, **fields} for ago, name, fields in events]
    rows = [{"step": n, "tokens": 8 * n, "samples": n, "time": NOW - 890 + n + 20 * (n > 4), "attempt": 1 + (n > 4),
             "train/loss": 2.0, "train/lr": 0.1, "train/grad_norm": 1.0, "train/tokens_per_s": 9.0, "train/step_s": 1.0,
             "train/data_wait_s": 0.1, "val/loss": 2.0, "val/perplexity": 7.4, "val/bits_per_byte": 1.0,
             "val/elapsed_s": 0.25} for n in range(1, 10)]  # fmt: skip
    return recorded, rows


def read_all(folder: Path) -> None:
    """Call everything that reads the two files."""
    for now in (NOW - 850, NOW):
        found = run_status.complete(folder, now, None, with_history=True)
        as_text.as_text(found, now).encode()
        table.lines([found], now)
        "\n".join(why.lines(found)).encode()
        view.lines(view.Snapshot(now, [found]), 80, 24, "braille")
        json.dumps(found, allow_nan=False)
        assert all(value >= 0 for value in goodput.measure(*attempts.read(folder), now).seconds.values())
    goodput.table(folder).encode()
    restart_history.count_restarts(records.events(folder), "7_0", 8)


def written(folder: Path, events: list[Any], rows: list[Any]) -> Path:
    if not (folder / "run.json").exists():
        run_folder.prepare(folder)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_complete_run_is_read_completely(tmp_path: Path) -> None:
    events, rows = complete_run()
    folder = written(tmp_path, events, rows)
    del events[1]["lost_until"]  # null is dropped
    assert attempts.read(folder) == (events, rows)
    read_all(folder)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "position", range(len(complete_run()[0])), ids=lambda position: complete_run()[0][position]["event"]
)
def test_no_field_of_an_event_can_end_a_reader(tmp_path: Path, position: int, share: int) -> None:
    """Each field once missing and once with each wrong value; no line follows."""
    events, rows = complete_run()
    for number, key in enumerate(events[position]):
        read_all(written(tmp_path, [*events[:position], {k: v for k, v in events[position].items() if k != key}], rows))
        for value in WRONG[(position + number) % share :: share]:
            read_all(written(tmp_path, [*events[:position], events[position] | {key: value}], rows))


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("position", [0, 4, 8])
def test_no_field_of_a_row_can_end_a_reader(tmp_path: Path, position: int, share: int) -> None:
    events, rows = complete_run()
    for number, key in enumerate(rows[position]):
        for value in [*WRONG, ...][(position + number) % share :: share]:
            damaged = {k: v for k, v in rows[position].items() if k != key} | ({} if value is ... else {key: value})
            read_all(written(tmp_path, events, [*rows[:position], damaged, *rows[position + 1 :]]))


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(20, 400))])
def test_readers_survive_any_change_of_the_lines(tmp_path: Path, seed: int) -> None:
    """Lines that are missing, doubled, moved, cut short or at another time; several wrong fields at once."""
    draw = random.Random(seed)
    changed: list[list[Any]] = []
    for lines in complete_run():
        changed.append([])
        for line in lines:
            for key in draw.sample(sorted(line), draw.randrange(len(line))) if draw.random() < 0.3 else ():
                line[key] = draw.choice(WRONG)
            if draw.random() < 0.2:
                line["time"] = draw.uniform(0, 2 * NOW)
            changed[-1] += [line] * draw.choice([0, 1, 1, 1, 1, 2])
        if draw.random() < 0.5:
            draw.shuffle(changed[-1])
    folder = written(tmp_path, changed[0], changed[1])
    for name in ("events.jsonl", "metrics.jsonl"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: draw.randrange(len(content) + 1)] if draw.random() < 0.3 else content)
    if draw.random() < 0.5:
        (folder / "generations").mkdir()
        (folder / "generations/000001.json").write_text(json.dumps(draw.choice(WRONG)))
    read_all(folder)


@pytest.mark.parametrize(
    "line",
    ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\0" * 100, "null", "[]", '"x"'],
    ids=["lists", "objects", "digits", "zeros", "null", "list", "text"],
)
def test_a_line_that_cannot_be_parsed_is_skipped(tmp_path: Path, line: str) -> None:
    events, rows = complete_run()
    folder = written(tmp_path, events, rows)
    for name in ("events.jsonl", "metrics.jsonl"):
        (folder / name).write_text(line + "\n" + (folder / name).read_text() + line)
    found_events, found_rows = attempts.read(folder)
    assert (len(found_events), len(found_rows)) == (len(events), len(rows))
    read_all(folder)


def test_a_null_time_of_an_older_version_is_harmless(tmp_path: Path) -> None:
    """It was written when slurmctld did not answer, and goodput's float(None) ended a finished run."""
    events, rows = complete_run()
    events[0] |= {"queued_at": None, "started_at": None}
    folder = written(tmp_path, events, rows)
    read_all(folder)
    assert goodput.measure(*attempts.read(folder)).productive_s == 9.0


def test_files_that_are_being_written_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    events, rows = complete_run()
    folder = written(tmp_path, events, rows)
    content = (folder / "metrics.jsonl").read_bytes()
    for size in (len(content) - 1, len(content) - 20):
        os.truncate(folder / "metrics.jsonl", size)
        assert run_status.complete(folder, NOW)["step"] in (8, 9)


def test_in_brief_the_events_of_old_saves_are_left_out_but_for_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of ten million steps has a hundred thousand of them."""
    monkeypatch.setattr(records, "EVENT_TAIL_BYTES", 60)
    saves: list[dict[str, Any]] = [
        {"event": name, "step": step} for step in range(1, 9) for name in ("save", "save_stall")
    ]
    others: list[dict[str, Any]] = [
        {"event": "start", "step": 0},
        {"event": "straggler", "step": 9},
        {"event": "end", "step": 10},
    ]
    events = [{"time": float(n), **event} for n, event in enumerate([others[0], *saves, *others[1:]])]
    folder = written(tmp_path, events, [])
    assert records.events(folder) == events
    brief = records.events(folder, brief=True)
    assert [(event["event"], event["step"]) for event in brief] == [
        ("start", 0), ("save", 8), ("straggler", 9), ("end", 10)
    ]  # fmt: skip
    assert attempts.newest_checkpoint(brief) == attempts.newest_checkpoint(events) == 8
    assert records.events(tmp_path / "none", brief=True) == []
