"""The report of a drill: a table of faults and outcomes, as Markdown for people and JSON for programs.

It describes the machine by architecture, processor and number of cores, without host names, users or paths.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcgpt.drill.injector import FaultResult
from hpcgpt.output.counted import counted
from hpcgpt.storage import atomic


@dataclass
class RoundReport:
    """`problems` is empty if the run ended by itself with the same bytes."""

    number: int
    partition: str
    attempts: int
    seconds: float
    faults: int
    problems: list[str]
    wandb: str
    goodput: str = ""
    checkpoints: int = 0  # the most at a time


@dataclass
class Report:
    command: str
    seed: int
    setting: dict[str, Any]
    kinds: dict[str, str]
    baseline_s: float = 0.0
    seconds: float = 0.0
    rounds: list[RoundReport] = field(default_factory=list)
    faults: list[FaultResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    proves: str = "the same bytes as the undisturbed run"

    @property
    def identical(self) -> bool:
        """Was there at least one fault, and are all runs as they must be?"""
        finished = bool(self.rounds) and self.hits > 0 and not self.problems
        well = all(not each.problems for each in self.rounds) and all(s.outcome != "FAILED" for s in self.faults)
        return finished and well

    @property
    def hits(self) -> int:
        return sum(result.outcome != "missed" for result in self.faults)

    @property
    def verdict(self) -> str:
        if self.identical:
            return f"GOOD: {counted(self.hits, 'fault')} in {counted(len(self.rounds), 'run')}, and {self.proves}"
        if self.rounds and not self.hits:
            return "NOTHING PROVEN: no fault found a victim"
        wrong = sum(bool(each.problems) for each in self.rounds)
        after = f"{wrong} of {counted(len(self.rounds), 'run')}, after {counted(self.hits, 'fault')}"
        return f"NOT GOOD (other bytes, or not by itself): {after}"


def write(report: Report, folder: Path, name: str, hidden: Mapping[str, str]) -> list[Path]:
    """Write <name>.md and <name>.json; returns their paths. The keys of `hidden` (paths and name of this machine, which
    quoted errors may contain) are replaced by its values."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".md": markdown(report), ".json": json.dumps(as_dict(report), indent=1) + "\n"}
    paths = []
    for ending, text in texts.items():
        for found in sorted((each for each in hidden if len(each) > 3), key=len, reverse=True):
            text = text.replace(found, hidden[found])
        paths.append(folder / f"{name}{ending}")
        atomic.write(paths[-1], text.encode())
    return paths


def as_dict(report: Report) -> dict[str, Any]:
    """Return the content of the JSON report. Its keys are fixed: programs read reports of all versions."""
    fields = {"strikes" if key == "faults" else key: value for key, value in dataclasses.asdict(report).items()}
    return fields | {"identical": report.identical, "verdict": report.verdict}


def markdown(report: Report) -> str:
    rows = [f"| {key} | {value} |" for key, value in {**report.setting, **report.machine}.items()]
    lines = [
        f"# Drill, seed {report.seed}",
        "",
        f"**{report.verdict}.**",
        "",
        f"    {report.command}",
        "",
        f"{report.seconds / 60:.1f} minutes in all; the undisturbed run took {report.baseline_s:.0f} s.",
        "",
        "| setting | |",
        "|---|---|",
        *rows,
        "",
        "## Faults",
        "",
        *table(report.faults, report.kinds),
        "",
        "Seconds to the first new step are counted from the fault; if the attempt is expected to survive it, from the "
        "fault's cleanup. A fault without a victim is missed.",
        "",
        "## Runs",
        "",
        *_rounds(report.rounds),
    ]
    if report.problems:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in report.problems)]
    lines += ["", "## One by one", "", *_one_by_one(report.faults), ""]
    return "\n".join(lines)


def table(faults: Sequence[FaultResult], kinds: Mapping[str, str]) -> list[str]:
    lines = [
        "| fault | what it does | hit | missed | median s to the first new step | max s | median steps lost "
        "| outcome |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for kind, about in kinds.items():
        mine = [result for result in faults if result.kind == kind]
        hits = [result for result in mine if result.outcome != "missed"]
        seconds = [result.back_s for result in hits if result.back_s is not None]
        lost = [result.lost_steps for result in hits if result.lost_steps is not None]
        outcomes = sorted({result.outcome for result in hits})
        counts = ", ".join(f"{sum(s.outcome == outcome for s in hits)} {outcome}" for outcome in outcomes)
        lines.append(
            f"| {kind} | {about} | {len(hits)} | {len(mine) - len(hits)} | {_median(seconds)} | "
            f"{f'{max(seconds):.1f}' if seconds else '-'} | {_median(lost)} | {counts or '-'} |"
        )
    return lines


def machine(slurm: str) -> dict[str, str]:
    """Describe versions and hardware; `slurm` is '' without Slurm."""
    return {
        "Python": platform.python_version(),
        "torch": metadata.version("torch"),
        "Slurm": slurm or "none",
        "machine": f"{platform.machine()}, {_processor()}, {counted(len(os.sched_getaffinity(0)), 'core')}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _rounds(rounds: Sequence[RoundReport]) -> list[str]:
    lines = [
        "| run | partition | faults | attempts | s | most checkpoints | wandb | goodput | result |",
        "|---|---|---:|---:|---:|---:|---|---|---|",
    ]
    for each in rounds:
        result = "good" if not each.problems else "**" + each.problems[0].splitlines()[0] + "**"
        lines.append(
            f"| {each.number} | {each.partition} | {each.faults} | {each.attempts} | {each.seconds:.0f} | "
            f"{each.checkpoints or '-'} | {each.wandb} | {each.goodput or '-'} | {result} |"
        )
    for each in rounds:
        for problem in each.problems:
            lines += ["", f"Run {each.number}:", "", "```", problem, "```"]
    return lines


def _one_by_one(faults: Sequence[FaultResult]) -> list[str]:
    lines = [
        "| at | run | step | fault | victim | outcome | s | steps lost | |",
        "|---:|---:|---:|---|---|---|---:|---:|---|",
    ]
    for s in faults:
        lost = "" if s.lost_steps is None else s.lost_steps
        back = "" if s.back_s is None else f"{s.back_s:.1f}"
        note = s.note.replace("\n", " ")
        lines.append(
            f"| {s.at_s:.0f} | {s.round} | {s.step} | {s.kind} | {s.victim} | {s.outcome} | {back} | {lost} | {note} |"
        )
    return lines


def _median(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f}".removesuffix(".0")
