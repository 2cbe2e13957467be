"""hpcgpt.report.page: what a page shows, of runs in any state, and that nothing in a run folder can act in it."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.report import facts, page
from hpcgpt.report.page import POLICY
from hpcgpt.run import run_folder
from tests.report.made_up import make_run
from tests.report.page_reader import Page

HOSTILE = (
    "</title></style></pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>&lt;b&gt;"
)
START = {"event": "start", "attempt": 1, "step": 0, "total_steps": 400, "world_size": 2, "hosts": ["n1", "n2"]}


def page_of(*folders: Path) -> Page:
    now = time.time()
    return Page(page.page([facts.read(folder, now, None) for folder in folders], [], now))


def run_with(folder: Path, *events: dict[str, Any], steps: int = 0) -> Path:
    run_folder.prepare(folder)
    lines = [json.dumps({"time": 1000.0 + n} | event) for n, event in enumerate(events)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    rows = [{"step": n, "time": 1010.0 + n, "attempt": 1, "tokens": n * 100, "train/loss": 3.0, "train/step_s": 1.0}
            for n in range(1, steps + 1)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long") / "long"
    make_run(folder, 12_000)
    return folder


def test_a_page_has_no_script_and_loads_nothing(long_run: Path) -> None:
    content = page.page([facts.read(long_run, time.time(), None)], [], time.time())
    found = Page(content)  # checks each tag and attribute
    assert "script" not in found.tags
    assert f'content="{POLICY.replace(chr(39), "&#x27;")}"' in content
    assert not re.search(r"(?i)https?:|url\(|@import|//[a-z]", content)


def test_a_hostile_run_executes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "\u2215")
    hostile: dict[str, Any] = {
        "reason": HOSTILE,
        "problem": HOSTILE,
        "words": HOSTILE,
        "host": HOSTILE,
        "path": HOSTILE,
    }
    run_with(
        folder, START | {"hosts": [HOSTILE], "job": HOSTILE},
        *({"event": name, "attempt": 1, "step": 3} | hostile for name in ("crash", "spike", "nonfinite", "save_failed",
                                                                          "straggler", "hang", "damaged_shard")),
        {"event": "changed", "changes": [{"key": HOSTILE, "before": HOSTILE, "now": {HOSTILE: HOSTILE}}]},
        {"event": "preflight", "failing": {HOSTILE: HOSTILE}}, {"event": "excluded", "hosts": [HOSTILE]},
        {"event": "end", "attempt": 1, "status": 1, "step": 400} | hostile, steps=400,
    )  # fmt: skip
    (folder / "samples.jsonl").write_text(json.dumps({"step": 5, "text": HOSTILE + "\x1b[2J\u202e\ud800"}) + "\n")
    (folder / "config.toml").write_text(f"[run]\nname = {json.dumps(HOSTILE)}\n[{json.dumps(HOSTILE)}]\nx = 1\n")
    (folder / "faults" / HOSTILE.replace("/", "_")).mkdir(parents=True)
    (folder / "faults" / HOSTILE.replace("/", "_") / "report.txt").write_text(HOSTILE)
    found = page_of(folder)
    assert found.text.count("<script>alert(1)</script>") > 10  # as text
    assert "\x1b" not in found.text
    assert "\\x1b[2J\\u202e\\ud800" in found.text


def test_the_spike_and_every_attempt_are_drawn(long_run: Path) -> None:
    found = page_of(long_run)
    lines = {name for name, _ in found.paths if name.startswith("line")}
    assert lines == {"line c0", "line c1", "line c2", "line c3", "line c4", "line c5", "line val"}
    assert sum(name == "mark start" for name, _ in found.paths) >= 11 * 4
    # The spike of one step, 4 nats above its neighbours, is a column of the band.
    highest = [min(_heights(path)) for name, path in found.paths if name.startswith("band")]
    assert sum(height < 400 for height in highest) > 0
    assert "attempt 12 began, at step 11,000" in found.text


def _heights(path: str) -> list[int]:
    """Return the y of each point of a path of relative lines."""
    begin = re.match(r"M(-?\d+) (-?\d+)", path)
    assert begin
    heights = [int(begin[2])]
    for _, down in re.findall(r"l(-?\d+) ?(-?\d+)", path):
        heights.append(heights[-1] + int(down))
    return heights


def test_what_a_reader_looks_for_is_there(long_run: Path) -> None:
    text = page_of(long_run).text
    for words in (
        "of 12,000", "finished", "Goodput", "productive", "Samples over time", "Once upon a time, step 250.",
        "How to continue", "hpcgpt train", "queue: waiting for Slurm", "Learning rate", "Gradient norm",
    ):  # fmt: skip
        assert words in text, words


def test_pages_are_small_and_their_size_does_not_grow_with_the_steps(long_run: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "short", 10)
    now = time.time()
    sizes = [len(page.page([facts.read(folder, now, None)], [], now)) for folder in (tmp_path / "short", long_run)]
    assert sizes[0] < 50_000
    assert sizes[1] < 200_000


def test_several_runs_are_drawn_over_each_other(long_run: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", run_with(tmp_path / "other", START, steps=50)
    make_run(one, 300)
    (one / "config.toml").write_text("[optim]\nlr = 0.5\nbeta1 = 0.9\n")
    (other / "config.toml").write_text("[optim]\nlr = 0.25\n")
    found = page_of(one, other, long_run)
    assert {"line c0", "line c1", "line c2"} <= {name for name, _ in found.paths}
    assert "Training loss by tokens" in found.text  # a step of them has different tokens
    differences = found.text[found.text.index("Where the runs differ") :]
    assert re.search(r"optim\.lr\s+0\.5\s+0\.25\s+6e-4", differences)
    assert "optim.beta1" not in differences
    assert found.text.count("How to continue") == 3


@pytest.mark.parametrize(
    ("events", "steps", "words"),
    [
        ((), 0, "No curve yet"),
        ((START,), 0, "No curve yet"),
        ((START,), 1, "No curve yet"),
        ((START,), 2, "of 400"),
        ((START, {"event": "end", "attempt": 1, "status": 0, "reason": "finished", "step": 400}), 400, "finished"),
    ],
)
def test_a_run_at_any_moment(events: tuple[dict[str, Any], ...], steps: int, words: str, tmp_path: Path) -> None:
    assert words in page_of(run_with(tmp_path / "run", *events, steps=steps)).text


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", START, steps=20)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": "x"}\n\x00\x00\n{"step": 21, "train/loss": NaN}\n{"step": 22, "ti')
    with open(folder / "events.jsonl", "a") as file:
        file.write('[]\n{"event": "rollback", "step": "a", "time": 1005}\n{"event": "excluded", "time": 1005}\n{"torn')
    (folder / "config.toml").write_text("[run\n")
    (folder / "samples.jsonl").write_text('{"step": 1, "text": 7}\nnonsense\n{"step": 2, "text": "seen"}\n')
    (folder / "checkpoints" / "step_000000020").mkdir()
    found = page_of(folder)
    assert "config.toml: " in found.text
    assert "seen" in found.text
    assert "step_000000020" in found.text
    assert "of 400" in found.text


def test_attempts_and_events_beyond_a_number_are_left_out(tmp_path: Path) -> None:
    events = [START | {"attempt": n} for n in range(1, 400)]
    events += [{"event": "straggler", "attempt": 1, "step": 3, "rank": n, "factor": 2.0} for n in range(5000)]
    found = page_of(run_with(tmp_path / "run", *events, steps=50))
    assert "the last 100 of 399" in found.text
    assert "4,850 in the middle left out" in found.text


def test_samples_are_spread_over_the_run(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "run", START, steps=5)
    lines = [json.dumps({"step": n, "text": f"text {n}"}) for n in range(1, 1001)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    found = facts.read(folder, time.time(), None)
    steps = [sample.step for sample in found.samples]
    assert (steps[0], steps[-1], len(steps), found.all_samples) == (1, 1000, facts.MOST_SAMPLES, 1000)
    assert max(after - before for before, after in itertools.pairwise(steps)) < 200


def test_samples_that_the_run_went_back_from_are_not_shown_and_none_is_shown_twice(tmp_path: Path) -> None:
    back = {"event": "rollback", "attempt": 1, "step": 15, "spiked_step": 26, "time": 1040.0}
    folder = run_with(tmp_path / "run", START, back, steps=5)
    made = ((10, 1010.0, "first"), (20, 1020.0, "old"), (25, 1030.0, "abandoned"), (20, 1050.0, "new"))
    lines = [json.dumps({"step": step, "time": at, "text": text}) for step, at, text in made]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    found = facts.read(folder, time.time(), None)
    assert [(sample.step, sample.text) for sample in found.samples] == [(10, "first"), (20, "new")]
    assert found.all_samples == 2


def test_runs_that_differ_by_little_look_different(tmp_path: Path) -> None:
    folders = []
    for name, rate, notes in (("a", "0.0006", "x" * 300), ("b", "0.0006000001", "x" * 299 + "y")):
        folders.append(run_with(tmp_path / name, START, steps=5))
        (folders[-1] / "config.toml").write_text(f'[optim]\nlr = {rate}\n[tracking]\nnotes = "{notes}"\n')
    content = page_of(*folders).text
    assert "0.0006000001" in content
    assert "x" * 299 + "y" in content
    assert "same configuration" not in content


def test_an_attempt_without_a_step_in_the_result_is_named(tmp_path: Path) -> None:
    again = START | {"attempt": 2, "time": 1100.0}
    folder = run_with(tmp_path / "run", START, again, steps=5)
    assert "no step of attempt 2 is part of the result" in page_of(folder).text


def test_an_attempt_with_changed_settings_is_marked(tmp_path: Path) -> None:
    again = START | {"attempt": 2, "step": 5, "time": 1100.0}
    change = {"key": "optim.lr", "before": 0.1, "now": 0.2, "affects_result": True}
    changed = {"event": "changed", "attempt": 2, "step": 5, "changes": [change], "time": 1100.0}
    folder = run_with(tmp_path / "run", START, again, changed, steps=5)
    row = {"step": 6, "time": 1110.0, "attempt": 2, "tokens": 600, "train/loss": 3.0, "train/step_s": 1.0}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    assert "#2 changed settings" in page_of(folder).text
