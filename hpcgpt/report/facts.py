"""Everything that a page shows of a run, read from its folder. What is missing or damaged is named, and not fatal."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpcgpt.checkpoint import layout, listing
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError, sentence
from hpcgpt.exit_codes import USER_MISTAKE
from hpcgpt.output.counted import counted
from hpcgpt.report import ends, strip
from hpcgpt.report.columns import Columns, Gatherer
from hpcgpt.report.strip import Mark
from hpcgpt.run import attempts, blocks, crash_report, records
from hpcgpt.run.condensed import Timing
from hpcgpt.run.records import Record
from hpcgpt.run.undone import Undone
from hpcgpt.slurm.queue import Queue
from hpcgpt.status import run_status

T = TypeVar("T")

MOST_SAMPLES = 12
SAMPLE_CHARACTERS = 1500
MOST_REPORTS = 5  # crash reports
REPORT_CHARACTERS = 6000
CONFIG_BYTES = 1 << 20
MOST_CHECKPOINTS = 40
NEWEST_STEPS, NEWEST_SHARE = 20, 0.01  # at least so many, and so many of all steps: their mean is the training loss


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote after `step` steps; cut off after SAMPLE_CHARACTERS."""

    step: int
    text: str


@dataclass
class Facts:
    """What is known of a run. `status`: see hpcgpt.status.run_status, with its history.

    `settings`: section.key of config.toml -> value. `state`: of the newest readable checkpoint. `crashes`: name and
    text of crash reports, the newest first. `problems`: what could not be read, and why. `tokens_per_s`: the median of
    all steps, in a long run of the means of blocks of steps.
    """

    folder: Path
    name: str
    status: dict[str, Any]
    columns: Columns
    events: Sequence[Record]
    tokens_per_s: float | None = None
    samples: Sequence[Sample] = ()
    all_samples: int = 0
    checkpoints: Sequence[dict[str, Any]] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    state: layout.State | None = None
    crashes: Sequence[tuple[str, str]] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def loss(self) -> tuple[float | None, int]:
        """Return the mean training loss of the newest steps, and of how many: one step alone says little."""
        last = int(self.columns.last[-1]) if len(self.columns) else 0
        return self.columns.newest_mean("train/loss", max(NEWEST_STEPS, round(last * NEWEST_SHARE)))

    @property
    def marks(self) -> list[Mark]:
        """Return where attempts failed and where the run went back, in the order of the steps."""
        entries = [entry for entry in self.status["history"] if entry["attempt"] is not None]
        found = [_mark(entry, later=entry is not entries[-1]) for entry in entries if _failed_or_lost(entry)]
        for event in self.events:
            if event["event"] == "rollback" and "step" in event:
                spiked = event.get("spiked_step", event["step"])
                words = f"went back from step {spiked:,} to step {event['step']:,}: the loss had a spike"
                found.append(Mark(float(spiked), strip.WENT_BACK, event.get("attempt"), words))
        return sorted(found, key=_at)


def _median(values: np.ndarray, counts: np.ndarray) -> float:
    """Return the median over all steps. Each value is the mean of as many steps as `counts` has for it."""
    order = np.argsort(values)
    before = np.cumsum(counts[order])
    return float(values[order[np.searchsorted(before, before[-1] / 2)]])


def _failed_or_lost(entry: dict[str, Any]) -> bool:
    return ends.failed(entry) or entry["lost_steps"] > 0


def _mark(entry: dict[str, Any], later: bool) -> Mark:
    """Mark the end of an attempt, after which the run went back if there is a `later` one."""
    reached, kept = entry["to_step"], entry["to_step"] - entry["lost_steps"]
    back = (
        "" if kept == reached else f", back to step {kept:,}" if later else f", {counted(reached - kept, 'step')} lost"
    )
    if ends.failed(entry):
        return Mark(
            float(reached), strip.FAILED, entry["attempt"], f"failed at step {reached:,}{back}: {entry['reason']}"
        )
    return Mark(float(reached), strip.WENT_BACK, entry["attempt"], f"ended at step {reached:,}{back}")


def _at(mark: Mark) -> float:
    return mark.at


def read(folder: Path, now: float, queue: Queue | None) -> Facts:
    """Read a run; `now` in unix seconds, `queue` has Slurm's answers.

    Raises:
        UserError: there is no run in `folder`.
        OSError: it cannot be read at all.
    """
    events = records.events(folder)
    gatherer, timing = Gatherer(), Timing(events)
    rates, steps = array("f"), array("q")  # of each block
    back = attempts.went_back_to(events)  # later rows are cut off when an attempt continues
    borders = timing.borders if back is None else np.union1d(timing.borders, back)
    for found_blocks in blocks.parts(folder, borders):
        timing.add(found_blocks)  # of all: the time was spent
        if back is not None:
            found_blocks = found_blocks[found_blocks["last"] <= back]
        gatherer.add(found_blocks)
        rate = found_blocks["train/tokens_per_s"][found_blocks["train/tokens_per_s"]["count"] > 0]
        rates.extend((rate["total"] / rate["count"]).tolist())
        steps.extend(rate["count"].tolist())
    status = run_status.complete(folder, now, queue, with_history=True, read=(events, timing.rows))
    found = Facts(folder, folder.resolve().name, status, gatherer.columns, events)
    found.tokens_per_s = _median(np.asarray(rates), np.asarray(steps)) if rates else None

    def part(what: str, make: Callable[[], T], otherwise: T) -> T:
        try:
            return make()
        except (OSError, UserError, ValueError, TypeError, RecursionError) as error:
            found.problems.append(f"{what}: {sentence(error)}")
            return otherwise

    found.settings = part("config.toml", lambda: _settings(folder / "config.toml"), {})
    none: tuple[list[Sample], int] = ([], 0)
    found.samples, found.all_samples = part("samples.jsonl", lambda: _samples(folder / "samples.jsonl", events), none)
    found.checkpoints = part("checkpoints", lambda: listing.rows(folder / "checkpoints"), [])
    found.state = part("state.json", lambda: _newest_state(folder, found.checkpoints), None)
    found.crashes = part("faults", lambda: _crashes(folder), [])
    return found


def defaults() -> dict[str, Any]:
    """Return the default of every key."""
    return _flat(dataclasses.asdict(Config()))


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Flatten {section: {key: value}}."""
    found: dict[str, Any] = {}
    for section, keys in table.items():
        if isinstance(keys, dict):
            found |= {f"{section}.{key}": value for key, value in keys.items()}
        else:
            found[section] = keys
    return found


def _settings(path: Path) -> dict[str, Any]:
    """Read config.toml as it is: of this version or another."""
    try:
        with open(path, "rb") as file:
            return _flat(tomllib.loads(file.read(CONFIG_BYTES).decode()))
    except FileNotFoundError:
        return {}


def _samples(path: Path, events: Sequence[Record]) -> tuple[list[Sample], int]:
    """Read at most MOST_SAMPLES samples, spread over the steps, and count them: of each step the newest.

    Without those that the run went back from. Of each sample only its place is kept until it is chosen.
    """
    undone = Undone()
    for event in events:
        undone.add(event)
    places: dict[int, int] = {}
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return [], 0
    with file:
        at = 0
        for line in file:
            found = _sample(line)
            if found and not undone.has(found[0].step, found[1]):
                places[found[0].step] = at
            at += len(line)
        steps = sorted(places)
        most = min(len(steps), MOST_SAMPLES)
        chosen = sorted({round(n * (len(steps) - 1) / max(1, most - 1)) for n in range(most)})
        samples = []
        for number in chosen:
            file.seek(places[steps[number]])
            if found := _sample(file.readline()):
                samples.append(found[0])
    return samples, len(steps)


def _sample(line: bytes) -> tuple[Sample, float] | None:
    """Parse a line of samples.jsonl: the sample, and when it was made; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(row, dict) and records.is_count(row.get("step")) and isinstance(row.get("text"), str)):
        return None
    text = row["text"]
    shown = text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")
    return Sample(row["step"], shown), float(row["time"]) if records.is_time(row.get("time")) else math.inf


def _newest_state(folder: Path, rows: Sequence[dict[str, Any]]) -> layout.State | None:
    """Read the state of the newest checkpoint whose structure is sound."""
    for row in rows:
        if row["step"] is not None and not row["problem"]:
            return layout.read_state(folder / "checkpoints" / row["name"])
    return None


def _crashes(folder: Path) -> list[tuple[str, str]]:
    """Read the newest crash reports: report.txt of the batch script, else what the ranks wrote themselves."""
    faults = [path for path in layout.entries(folder / "faults") if path.is_dir()]
    found = []
    for path in sorted(faults, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            text = (path / "report.txt").read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            # A start that was refused (a wrong setting, a folder in use) is no failure of the run.
            of_ranks = [fault for fault in crash_report.read(folder, path.name) if fault.status != USER_MISTAKE]
            text = "\n\n".join(_fault_text(fault) for fault in of_ranks[:3])
        if text:
            found.append((path.name, text[:REPORT_CHARACTERS]))
        if len(found) == MOST_REPORTS:
            break
    return found


def _fault_text(fault: crash_report.Fault) -> str:
    at = f", after step {fault.step:,}" if isinstance(fault.step, int) else ""
    trace = fault.trace if isinstance(fault.trace, list) else []
    return "\n".join([f"rank {fault.rank} on {fault.host}{at}: {fault.reason}", *map(str, trace)])
