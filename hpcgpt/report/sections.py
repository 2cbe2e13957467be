"""The parts of a page about one run: its head, attempts, events, samples, checkpoints, settings and versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcgpt.config import sources
from hpcgpt.output import terminal
from hpcgpt.plan import longer
from hpcgpt.report import bars, ends, summary
from hpcgpt.report.facts import MOST_CHECKPOINTS, Facts, defaults
from hpcgpt.report.markup import EMPTY, Child, Markup, colour, cut, element, join, table
from hpcgpt.report.notes import Note, notes
from hpcgpt.report.scale import short
from hpcgpt.run.goodput import Goodput
from hpcgpt.status import why
from hpcgpt.status.figures import count, span
from hpcgpt.status.run_state import ALIVE, STOP_FILE, WAITING

MOST_ATTEMPTS = 100
MOST_NOTES = 150


def section(title: str, *parts: Child) -> Markup:
    """Make a section with a heading."""
    return element("section", element("h2", title), *parts)


def head(run: Facts) -> Markup:
    """Show the state of a run and its most important figures."""
    found = run.status
    state = element("span", found["state"], class_=f"state {found['state']}")
    total = found["total_steps"]
    running = found["state"] == "running" and found["time_left_s"] is not None
    left = f", {span(found['time_left_s'])} left" if running else ""
    progress = join(f"of {total:,}{left}", _progress_bar(found["step"], total)) if total else None
    goodput = Goodput.from_dict(found["goodput"]) if found["goodput"] else None
    loss, steps = run.loss
    cards = [
        _card("step", f"{found['step']:,}", progress),
        _card("training loss", _figure(loss, ".4f"), f"mean of the last {steps:,} steps" if steps > 1 else None),
        _card("validation loss", _figure(found["val/loss"], ".4f"), _bits(found)),
        _card("tokens", count(found["tokens"]) if found["tokens"] else "–"),
        _card("tokens a second", _figure(run.tokens_per_s, ",.0f"), "median of all steps"),
        _card("goodput", *_goodput(goodput)),
    ]
    reason = element("p", found["reason"], class_="reason") if found["reason"] not in ("", found["state"]) else None
    hosts = list(filter(None, found["hosts"]))
    on = f", on host{'s' * (len(hosts) > 1)} {why.compressed(hosts)}" if hosts else ""
    where = element("p", f"{found['run']}{on}", class_="where")
    title = element("h1", run.name, " ", state)
    return element("header", title, *_sentences(run, goodput), where, reason, element("div", *cards, class_="cards"))


def _sentences(run: Facts, goodput: Goodput | None) -> list[Markup]:
    """Say what the run is, why it has several attempts, and what its time was spent on."""
    lost_steps = goodput.lost_steps if goodput else 0
    course = [
        ends.sentence(run.status["history"], lost_steps, run.status["step"]),
        summary.time_spent(goodput) if goodput else "",
    ]
    texts = (summary.sentence(run), " ".join(filter(None, course)))
    return [element("p", text, class_="about") for text in texts if text]


def _goodput(found: Goodput | None) -> tuple[str, str | None]:
    """Return goodput, and what it is a share of."""
    if found is None or found.goodput is None:
        return "–", None
    return f"{found.goodput:.1%}", f"{span(found.productive_s)} of {span(found.active_s)} in steps that count"


def problems(run: Facts) -> Markup:
    """List what could not be read."""
    if not run.problems:
        return EMPTY
    items = element("ul", *(element("li", problem) for problem in run.problems))
    return element("div", element("b", "Not everything could be read:"), items, class_="problems")


def attempts(run: Facts) -> Markup:
    """Show when each attempt ran, what it added, and how it ended."""
    history = run.status["history"]
    if not history:
        return section("Attempts", element("p", "None yet."))
    shown = history[-MOST_ATTEMPTS:]
    rows: list[list[Child]] = []
    for entry in shown:
        began, job, took, hosts, gained, reached, end = why.columns(entry)
        number, _, began = began.partition(" ")
        mark = element("i", class_=f"key {colour(entry['attempt'] - 1)}") if entry["attempt"] else EMPTY
        rows.append([join(mark, number), began, job, took, hosts, gained, reached.removeprefix("to "), end])
    left_out = f" (the last {MOST_ATTEMPTS} of {len(history):,})" if len(shown) < len(history) else ""
    names: list[Child] = ["", "began", "job", "took", "nodes", "steps added", "up to", "how it ended"]
    listed = table(names, rows, f"Attempts{left_out}", numbers=(3, 5, 6), texts=(7,))
    return section("Attempts", bars.attempts_in_time(history), listed)


def time_spent(run: Facts) -> Markup:
    """Show the goodput."""
    figures = run.status["goodput"]
    about = (
        "Goodput is the time of productive steps (those that were not repeated later) as a fraction of the time in "
        "which a job was queued or running; so are the other percentages. The bar has idle time, too."
    )
    return section(
        "Where the time went",
        element("p", about, class_="note"),
        bars.goodput(Goodput.from_dict(figures)) if figures else None,
    )


def faults(run: Facts) -> Markup:
    """Show faults, changes and ends, and the crash reports."""
    found = notes(run.events)
    if not found and not run.crashes:
        return section("Faults and changes", element("p", "None."))
    kept = found if len(found) <= MOST_NOTES else [*found[: MOST_NOTES // 3], *found[-MOST_NOTES * 2 // 3 :]]
    left_out = f" ({len(found) - len(kept):,} in the middle left out)" if len(kept) < len(found) else ""
    rows = [_note(note) for note in kept]
    listed = table(["time", "step", "attempt", "what", ""], rows, f"Events{left_out}", numbers=(1, 2), texts=(4,))
    reports = [
        element("details", element("summary", f"Crash report of {name}"), element("pre", text))
        for name, text in run.crashes
    ]
    return section("Faults and changes", listed if rows else None, *reports)


def samples(run: Facts) -> Markup:
    """Show texts that the model wrote while it was trained, the oldest first."""
    if not run.samples:
        return EMPTY
    shown = [
        element("div", element("b", f"step {sample.step:,}"), element("pre", sample.text, dir="auto"), class_="sample")
        for sample in run.samples
    ]
    about = f"{len(run.samples)} of {run.all_samples:,}, written while it was trained."
    return section("Samples over time", element("p", about, class_="note"), element("div", *shown, class_="samples"))


def checkpoints(run: Facts) -> Markup:
    """List the checkpoints."""
    if not run.checkpoints:
        return section("Checkpoints", element("p", "None yet."))
    rows: list[list[Child]] = []
    for row in run.checkpoints[:MOST_CHECKPOINTS]:
        size = f"{row['bytes'] / 1e6:,.1f}" if row["bytes"] is not None else ""
        loss = f"{row['val_loss']:.4f}" if row["val_loss"] is not None else ""
        rows.append([row["name"], size, loss, row["world_size"], f"{row['state']} {row['problem']}".strip()])
    left_out = f" (the newest {MOST_CHECKPOINTS} of {len(run.checkpoints):,})" * (len(rows) < len(run.checkpoints))
    names: list[Child] = ["name", "MB", "validation loss", "ranks", "state"]
    return section("Checkpoints", table(names, rows, f"Checkpoints{left_out}", numbers=(1, 2, 3), texts=(4,)))


def what_next(run: Facts) -> Markup:
    """Show the commands with which a reader continues."""
    folder = terminal.printable(shlex.quote(run.status["run"]))
    config = f"{folder}/config.toml"
    state, total = run.status["state"], run.status["total_steps"]
    lines: list[tuple[str, str]] = []
    if state in (*ALIVE, *WAITING):
        lines.append(("follow it", f"hpcgpt status {folder} --watch"))
    elif run.settings:
        about, first = "continue from the newest checkpoint", ""
        arguments = " ".join(filter(None, (config, _flags_if_moved(run))))
        if state == "imported":
            about, arguments = "train on from these weights, in a run of its own", f"{config} --data.dir SHARDS"
        elif state == "finished" and total:
            about, arguments = "train longer", f"{arguments} --train.steps {longer(total)}"
        elif run.status["reason"] == STOP_FILE:
            first = f"rm {folder}/STOP && "
        lines += [
            (about, f"{first}hpcgpt train {arguments}"),
            ("the same on Slurm, with the flags of your job", f"{first}hpcgpt submit --nodes N {arguments}"),
        ]
    lines += [
        ("write text", f'hpcgpt sample {folder} --prompt "Once upon a time"'),
        ("loss over the whole validation split", f"hpcgpt eval {folder}"),
        ("why each attempt ended", f"hpcgpt status {folder} --why"),
        ("begin another run with these weights", f"hpcgpt train my.toml --run.init_from {folder}"),
    ]
    items = [
        element("dl", *(join(element("dt", about), element("dd", element("code", line))) for about, line in lines))
    ]
    return section("How to continue", *items)


def _flags_if_moved(run: Facts) -> str:
    """Return the flags without which the run's config.toml means another folder; see `sources.flags_if_moved`."""
    named = defaults() | run.settings
    folder = Path(str(named["run.dir"])) / str(named["run.name"])
    return terminal.printable(sources.flags_if_moved(Path(run.status["run"]) / "config.toml", folder))


def settings(run: Facts) -> Markup:
    """Show the configuration: what differs from the defaults, then all of it."""
    if not run.settings:
        return EMPTY
    usual = defaults()
    different = {key: value for key, value in run.settings.items() if _value(usual.get(key)) != _value(value)}
    rows: list[list[Child]] = [[key, _value(value), _value(usual.get(key, "–"))] for key, value in different.items()]
    everything = "\n".join(f"{key} = {_value(value)}" for key, value in run.settings.items())
    return section(
        "Configuration",
        table(["key", "value", "default"], rows, "What differs from the defaults", texts=(1, 2)),
        element("details", element("summary", f"All {len(run.settings)} keys"), element("pre", everything)),
    )


def versions(run: Facts) -> Markup:
    """Show the software and hardware of the attempt that saved the newest checkpoint, and the data."""
    if run.state is None:
        return EMPTY
    known = {key: value for key, value in run.state.in_effect.items() if "." not in key and key != "total_steps"}
    known |= {key: run.state.in_effect[key] for key in _RESOLVED if key in run.state.in_effect}
    known |= {key: value for key, value in run.state.identity.items() if "." not in key}
    known |= {"commit": commit} if (commit := summary.code(run)) else {}
    rows: list[list[Child]] = [[key, _value(value)] for key, value in known.items()]
    return section(
        "Versions and data", table(["", ""], rows, f"Of the checkpoint of step {run.state.step:,}", texts=(1,))
    )


_RESOLVED = ("run.device", "run.backend", "run.threads", "train.dtype", "train.compile")


def differences(runs: Sequence[Facts]) -> Markup:
    """Show the keys in which the configurations of several runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    usual = defaults()
    rows: list[list[Child]] = []
    for key in keys:
        values = [run.settings.get(key, usual.get(key, "–")) for run in runs]
        if len(set(map(repr, values))) > 1 and key != "run.name":
            rows.append([key, *_distinct(values)])
    if not rows:
        return section("Configuration", element("p", "The runs have the same configuration."))
    return section(
        "Configuration",
        table(["key", *(run.name for run in runs)], rows, "Where the runs differ", texts=(*range(1, len(runs) + 1),)),
    )


def overview(runs: Sequence[Facts]) -> Markup:
    """Show a line for each of several runs."""
    rows: list[list[Child]] = []
    for number, run in enumerate(runs):
        found = run.status
        goodput = found["goodput"]["goodput"] if found["goodput"] else None
        total = f" of {found['total_steps']:,}" if found["total_steps"] else ""
        rows.append([
            join(element("i", class_=f"key {colour(number)}"), element("a", run.name, href=f"#run{number}")),
            element("span", found["state"], class_=f"state {found['state']}"),
            f"{found['step']:,}{total}", count(found["tokens"]), _figure(run.loss[0], ".4f"),
            _figure(found["val/loss"], ".4f"), count(run.tokens_per_s),
            f"{goodput:.1%}" if goodput is not None else "–", str(found["attempts"]),
        ])  # fmt: skip
    names: list[Child] = ["run", "state", "step", "tokens", "training loss", "validation loss", "tokens a second",
                          "goodput", "attempts"]  # fmt: skip
    about = element("p", "Training loss: mean of the last steps. Tokens a second: median of all steps.", class_="note")
    return join(table(names, rows, "Runs", numbers=(2, 3, 4, 5, 6, 7, 8)), about)


def _card(name: str, figure: str, below: Child = None) -> Markup:
    return element("div", element("small", name), element("b", figure), element("span", below) if below else None)


def _progress_bar(step: int, total: int) -> Markup:
    return element("progress", value=min(step, total), max=total, aria_label="progress")


def _bits(found: dict[str, Any]) -> str | None:
    bits = found["val/bits_per_byte"]
    return f"{bits:.4f} bits per byte" if bits is not None else None


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _note(note: Note) -> list[Child]:
    kind = element("span", note.kind, class_=f"note-{note.weight}")
    step = f"{note.step:,}" if note.step is not None else ""
    return [bars.moment(note.time), step, note.attempt, kind, cut(note.words)]


def _value(value: Any) -> str:
    """Format a value of the configuration in a few characters."""
    if isinstance(value, float):
        return short(value) if 0 < abs(value) < 1e-3 else f"{value:g}"
    return cut(value if isinstance(value, str) else json.dumps(value, default=str))


def _distinct(values: Sequence[Any]) -> list[str]:
    """Format values so that different ones look different; where that takes more characters, whole."""
    short_ones = [_value(value) for value in values]
    if len(set(short_ones)) == len(set(map(repr, values))):
        return short_ones
    return [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
