"""What a drill tells at its end: a table of faults and outcomes, as Markdown for people and JSON for programs.

Of the machine it says the architecture, the processor and the number of cores; no host names, users or paths.
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

from hpcgpt.drill.injector import Strike
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
    strikes: list[Strike] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    proves: str = "the same bytes as the run left alone"

    @property
    def identical(self) -> bool:
        """Was there anything to judge, and is all of it as it has to be?"""
        finished = bool(self.rounds) and self.hits > 0 and not self.problems
        well = all(not each.problems for each in self.rounds) and all(s.outcome != "FAILED" for s in self.strikes)
        return finished and well

    @property
    def hits(self) -> int:
        return sum(strike.outcome != "missed" for strike in self.strikes)

    @property
    def verdict(self) -> str:
        if self.identical:
            return f"GOOD: {self.hits} faults in {len(self.rounds)} runs, and {self.proves}"
        if self.rounds and not self.hits:
            return "NOTHING PROVEN: no fault has hit"
        wrong = sum(bool(each.problems) for each in self.rounds)
        return f"NOT GOOD (other bytes, or not by itself): {wrong} of {len(self.rounds)} runs, after {self.hits} faults"


def write(report: Report, folder: Path, name: str, hidden: Mapping[str, str]) -> list[Path]:
    """Write <name>.md and <name>.json; returns both. What is in `hidden` (paths of this machine, its name) is replaced:
    the words of a failed run are quoted, and may have it."""
    folder.mkdir(parents=True, exist_ok=True)
    told = dataclasses.asdict(report) | {"identical": report.identical, "verdict": report.verdict}
    texts = {".md": markdown(report), ".json": json.dumps(told, indent=1) + "\n"}
    paths = []
    for ending, text in texts.items():
        for found in sorted((each for each in hidden if len(each) > 3), key=len, reverse=True):
            text = text.replace(found, hidden[found])
        paths.append(folder / f"{name}{ending}")
        atomic.write(paths[-1], text.encode())
    return paths


def markdown(report: Report) -> str:
    rows = [f"| {key} | {value} |" for key, value in {**report.setting, **report.machine}.items()]
    lines = [
        f"# Drill, seed {report.seed}",
        "",
        f"**{report.verdict}.**",
        "",
        f"    {report.command}",
        "",
        f"{report.seconds / 60:.1f} minutes in all; the run that was left alone took {report.baseline_s:.0f} s.",
        "",
        "| setting | |",
        "|---|---|",
        *rows,
        "",
        "## Faults",
        "",
        *table(report.strikes, report.kinds),
        "",
        "Seconds to the first new step are counted from the hit; for a fault that is expected to leave the attempt "
        "alive, from its undoing. A fault that found nothing to hit is missed.",
        "",
        "## Runs",
        "",
        *_rounds(report.rounds),
    ]
    if report.problems:
        lines += ["", "## Problems", "", *(f"- {problem}" for problem in report.problems)]
    lines += ["", "## One by one", "", *_one_by_one(report.strikes), ""]
    return "\n".join(lines)


def table(strikes: Sequence[Strike], kinds: Mapping[str, str]) -> list[str]:
    lines = [
        "| fault | what it does | hit | missed | median s to the first new step | max s | median steps lost "
        "| outcome |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for kind, about in kinds.items():
        mine = [strike for strike in strikes if strike.kind == kind]
        hits = [strike for strike in mine if strike.outcome != "missed"]
        seconds = [strike.back_s for strike in hits if strike.back_s is not None]
        lost = [strike.lost_steps for strike in hits if strike.lost_steps is not None]
        outcomes = sorted({strike.outcome for strike in hits})
        counts = ", ".join(f"{sum(s.outcome == outcome for s in hits)} {outcome}" for outcome in outcomes)
        lines.append(
            f"| {kind} | {about} | {len(hits)} | {len(mine) - len(hits)} | {_median(seconds)} | "
            f"{f'{max(seconds):.1f}' if seconds else '-'} | {_median(lost)} | {counts or '-'} |"
        )
    return lines


def machine(slurm: str) -> dict[str, str]:
    """Versions and hardware; `slurm` is '' where there was none."""
    return {
        "Python": platform.python_version(),
        "torch": metadata.version("torch"),
        "Slurm": slurm or "none",
        "machine": f"{platform.machine()}, {_processor()}, {len(os.sched_getaffinity(0))} cores",
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


def _one_by_one(strikes: Sequence[Strike]) -> list[str]:
    lines = [
        "| at | run | step | fault | victim | outcome | s | steps lost | |",
        "|---:|---:|---:|---|---|---|---:|---:|---|",
    ]
    for s in strikes:
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
