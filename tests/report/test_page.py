"""hpcgpt.report.page: what a page shows, of runs in any state, and that nothing in a run folder can act in it."""

from __future__ import annotations

import html
import itertools
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import train
from hpcgpt.config import sources
from hpcgpt.distributed import world
from hpcgpt.errors import UserError, status_of
from hpcgpt.report import facts, page
from hpcgpt.report.page import POLICY
from hpcgpt.run import blocks, blocks_file, condensed, crash_report, run_folder
from hpcgpt.status import run_state
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


def test_a_start_that_was_refused_has_no_crash_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = run_with(tmp_path / "run", START, steps=3)
    for attempt, error in (("refused", UserError("model.n_layer has changed")), ("crashed", OSError("the disk died"))):
        here = world.World(0, 0, 1, 1, "alone", attempt)
        crash_report.write(folder, here, error, status_of(error))
    text = page_of(folder).text
    assert ("the disk died" in text, "model.n_layer has changed" in text) == (True, False)


def test_the_spike_and_every_attempt_are_drawn(long_run: Path) -> None:
    found = page_of(long_run)
    lines = {name for name, _ in found.paths if name.startswith("line")}
    assert lines == {*(f"line c{number}" for number in range(8)), "line val"}
    assert {f"of c{number}" for number in range(8)} <= {name for name, _ in found.paths}  # the strip of attempts
    # The spike of one step, 4 nats above its neighbours, is a column of the band.
    highest = [min(_heights(path)) for name, path in found.paths if name.startswith("band")]
    assert sum(height < 400 for height in highest) > 0


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


def test_a_dot_names_the_steps_that_it_may_be_of(long_run: Path) -> None:
    assert re.search(r"validation loss [\d.]+ at step 241 to 256\n", page_of(long_run).text)  # validated at 250


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


def test_a_page_of_imported_weights_says_how_to_train_on_from_them(tmp_path: Path) -> None:
    folder = run_with(tmp_path / "qwen")
    (folder / "imported.json").write_text("{}")
    (folder / "config.toml").write_text("[run]\nname = 'qwen-continued'\n")
    text = page_of(folder).text
    assert "imported" in text
    assert f"hpcgpt train {folder}/config.toml --data.dir SHARDS" in text
    assert "continue from the newest checkpoint" not in text


@pytest.mark.processes
def test_the_commands_with_which_to_continue_work(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are on the page, with --dry-run; the flags of a job are the reader's."""
    commands = _commands(run)
    moved = f"{run}/config.toml --run.dir {run.parent} --run.name {run.name}"  # this one is a copy
    assert commands["train longer"] == f"hpcgpt train {moved} --train.steps 18"
    on_slurm = commands["the same on Slurm, with the flags of your job"]
    assert on_slurm == f"hpcgpt submit --nodes N {moved} --train.steps 18"
    assert train.main([*shlex.split(commands["train longer"])[2:], "--dry-run"]) == 0
    assert "would continue at step 12 of 18" in capsys.readouterr().out
    monkeypatch.setattr(run_state, "find", _stopped)
    assert _commands(run)["continue from the newest checkpoint"] == f"rm {run}/STOP && hpcgpt train {moved}"
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(sources.from_file(run / "config.toml").run.dir, str(run.parent)))
    assert _commands(run)["continue from the newest checkpoint"] == f"rm {run}/STOP && hpcgpt train {run}/config.toml"
    monkeypatch.setattr(run_state, "find", _running)
    assert _commands(run)["follow it"] == f"hpcgpt status {run} --watch"
    assert not any("hpcgpt train /" in command for command in _commands(run).values())


def _stopped(*_: object) -> run_state.State:
    return run_state.State("stopped", run_state.STOP_FILE)


def _running(*_: object) -> run_state.State:
    return run_state.State("running", still_s=1.0)


def _commands(folder: Path) -> dict[str, str]:
    """Return the commands on a page, by what they do."""
    content = page.page([facts.read(folder, time.time(), None)], [], time.time())
    part = content[content.index("How to continue") :]
    found = re.findall(r"<dt>(.*?)</dt>\s*<dd><code>(.*?)</code></dd>", part)
    return {about: html.unescape(command) for about, command in found}


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


def test_a_sample_of_an_attempt_on_a_host_whose_clock_is_behind_is_shown(tmp_path: Path) -> None:
    back = {"event": "went_back", "attempt": 2, "step": 15, "from_step": 20, "time": 2000.0}
    folder = run_with(tmp_path / "run", START, back, START | {"attempt": 3, "step": 15, "time": 1900.0}, steps=5)
    made = ((10, 1010.0, "first"), (20, 1020.0, "old"), (25, 1030.0, "abandoned"), (20, 1950.0, "new"))
    lines = [json.dumps({"step": step, "time": at, "text": text}) for step, at, text in made]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    found = facts.read(folder, time.time(), None)
    assert [(sample.step, sample.text) for sample in found.samples] == [(10, "first"), (20, "new")]


@pytest.mark.parametrize("whole_bytes", [blocks.WHOLE_BYTES, 0])
def test_steps_that_the_run_went_back_over_are_in_no_curve_and_no_figure(
    whole_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in metrics.jsonl until an attempt continues. With 0, it is read as that of a long run, in blocks."""
    monkeypatch.setattr(blocks, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(blocks_file, "PIECE_BYTES", 1000)
    back = {"event": "went_back", "attempt": 2, "step": 100, "from_step": 200, "time": 2000.0}
    more = [{"event": "wandb", "attempt": 0, "words": f"{n}", "time": 2001.0 + n} for n in range(condensed.EXACT)]
    folder = run_with(tmp_path / "run", START, back, *more)
    rows = [{"step": n, "time": 1010.0 + n, "attempt": 1, "tokens": n * 100, "train/step_s": 1.0,
             "train/loss": 3.0 if n <= 100 else 9.0, "train/tokens_per_s": 100.0 if n <= 100 else 7.0}
            for n in range(1, 251)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not whole_bytes:
        stored = blocks_file.BlocksFile(folder / "metrics.jsonl", lambda: None)
        stored.follow((folder / "metrics.jsonl").stat().st_size, 250)
        stored.close()
        assert (folder / blocks.FILE_NAME).stat().st_size > blocks.HEADER_BYTES
    found = facts.read(folder, time.time(), None)
    assert found.status["step"] == 100
    assert (int(found.columns.last[-1]), found.columns.tokens[-1]) == (100, 10_000)
    assert (found.loss[0], found.tokens_per_s) == (3.0, 100.0)
    again = START | {"attempt": 3, "step": 100, "time": 3000.0}
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:150]))
    assert int(facts.read(folder, time.time(), None).columns.last[-1]) == 150


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


def eventful(folder: Path) -> Path:
    """Make a run of 400 steps with attempts of any length: changed settings, kills, a crash, a spike."""
    begins = (0, 100, 110, 118, 125, 180, 300, 310)
    change = {"key": "optim.lr", "before": 0.1, "now": 0.2, "affects_result": True}
    events: list[dict[str, Any]] = []
    for attempt, begin in enumerate(begins, start=1):
        at = 1000.0 + begin + attempt * 20
        events.append(START | {"attempt": attempt, "step": begin, "time": at, "lost_steps": 2 * (attempt in (3, 4))})
        if attempt in (3, 4, 7, 8):
            events.append({"event": "changed", "attempt": attempt, "step": begin, "changes": [change], "time": at})
        if attempt == 6:
            events.append({"event": "rollback", "attempt": 6, "step": 200, "spiked_step": 210, "time": at + 50})
        if attempt not in (2, 3):
            status, why = (0, "finished") if attempt == 8 else (75, "told to terminate")
            last = (*begins, 400)[attempt]
            events.append(
                {"event": "end", "attempt": attempt, "status": status, "reason": why, "step": last, "time": at + 90}
            )
    run_with(folder, *events)
    rows = []
    for step in range(1, 401):
        attempt = sum(step > begin for begin in begins)
        rows.append({"step": step, "time": 1010.0 + step + attempt * 20, "attempt": attempt, "tokens": step * 100,
                     "train/loss": 3.0 + step % 3, "train/step_s": 1.0, "train/tokens_per_s": 100.0})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WIDTHS = (300, 1000)  # pixels of a chart: on a phone, and of the first one on a screen
CHARACTER = 6.0  # pixels of one of the labels, at least


def _labels(content: str) -> list[tuple[float, float, str]]:
    """Return where the labels of the first chart begin and end, as fractions; a limit of 0 is none; and their texts."""
    chart = content[content.index("<figure") : content.index("</figure>")]
    area = chart[chart.index('class="area"') : chart.index('<div class="of"')]
    found = re.findall(r'<span[^>]*style="left:([\d.]+)%(?:;width:([\d.]+)%)?">(.*?)</span>', area)
    return [(float(left) / 100, float(wide or 0) / 100, re.sub("<.*?>", "", text)) for left, wide, text in found]


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_attempts_and_faults_do_not_overlap(width: int, tmp_path: Path) -> None:
    now = time.time()
    content = page.page([facts.read(eventful(tmp_path / "run"), now, None)], [], now)
    attempts = [label for label in _labels(content) if label[1]]
    faults = [label for label in _labels(content) if not label[1]]
    # Of attempt 4, from step 118 to 125, the number has 1.75 % of the width: style.css hides it on a phone.
    assert [text for _, _, text in attempts] == ["1", "2", "3*", "4*", "5", "6", "7*", "8*"]
    for (left, wide, _), (right, _, _) in itertools.pairwise(attempts):
        assert left + wide <= right + 1e-4
    assert faults
    for (left, _, text), (right, _, _) in itertools.pairwise(faults):
        assert left * width + CHARACTER * len(text) < right * width


def test_changed_settings_are_in_words_beside_the_charts(tmp_path: Path) -> None:
    content = page_of(eventful(tmp_path / "run")).text
    curves = content[content.index("Curves") : content.index("Where the time went")]
    for attempt, step in ((3, 110), (4, 118), (7, 300), (8, 310)):
        assert f"attempt {attempt}, from step {step}: optim.lr: 0.1 → 0.2" in curves


def test_a_failure_and_going_back_are_two_marks_and_name_the_attempt(tmp_path: Path) -> None:
    now = time.time()
    run = facts.read(eventful(tmp_path / "run"), now, None)
    assert [(mark.at, mark.glyph, mark.attempt) for mark in run.marks] == [(112, "▲", 2), (120, "▲", 3), (210, "←", 6)]
    content = page.page([run], [], now)
    assert [text for *_, text in _labels(content) if text[0] in "▲←"] == ["▲", "←6"]  # two are too close to be two
    text = Page(content).text
    assert "attempt 2 failed at step 112, back to step 110: nothing reported" in text
    assert "attempt 6 went back from step 210 to step 200: the loss had a spike" in text


def test_the_figures_at_the_top_agree(long_run: Path) -> None:
    """Tokens, tokens a second, goodput and times are of one run: a reader can compute one from others."""
    run = facts.read(long_run, time.time(), None)
    text = page_of(long_run).text
    head = text[: text.index("Curves")]
    seconds = {"s": 1, "min": 60, "h": 3600}
    sentence = head[: head.index("in the queue") + 12]
    spans = {words: float(number) * seconds[unit] for number, unit, words in re.findall(
        r"([\d.]+) (s|min|h) (in all|in steps|lost|for starting|in the queue)", sentence)}  # fmt: skip
    whole = spans.pop("in all")
    assert sum(spans.values()) == pytest.approx(whole, rel=0.02)
    goodput = re.search(r"goodput\s+([\d.]+)%\s+[\d.]+ \w+ of ([\d.]+ \w+) in steps that count", head)
    assert goodput
    assert f"{goodput[2]} in all" in head
    assert float(goodput[1]) / 100 == pytest.approx(spans["in steps"] / whole, rel=0.02)
    rate = re.search(r"tokens a second\s+([\d,]+)\s+median of all steps", head)
    assert rate
    assert float(rate[1].replace(",", "")) * spans["in steps"] == pytest.approx(run.status["tokens"], rel=0.03)


def test_productive_time_has_the_percentage_of_goodput(tmp_path: Path) -> None:
    text = page_of(eventful(tmp_path / "run")).text  # it was idle for 40 s, which are no part of the percentages
    goodput = re.search(r"goodput\s+([\d.]+%)", text)
    assert goodput
    assert re.search(rf"\nproductive [\d.]+ min, {goodput[1]}\n", text)
    assert re.search(r"\nidle: no job queued or running 40 s\n", text)


def test_the_training_loss_is_a_mean_of_the_last_steps(tmp_path: Path) -> None:
    found = page_of(eventful(tmp_path / "run")).text
    assert re.search(r"training loss\s+3\.9500\s+mean of the last 20 steps", found)


def test_the_norm_to_which_gradients_are_clipped_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    make_run(folder, 300)
    for limit, shown in (
        ("1.0", "before clipping at 1"),
        ("0.4", "before clipping at 0.4 (dashed)"),
        ("0", "before clipping"),
    ):
        (folder / "config.toml").write_text(f"[optim]\nclip_norm = {limit}\n")
        found = page_of(folder)
        assert f"\n{shown}\n" in found.text
        assert ("dashed" in shown) == any(name == "level" for name, _ in found.paths)
