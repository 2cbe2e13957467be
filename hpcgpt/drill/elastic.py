"""The other drill: the number of ranks changes between attempts, 4 -> 2 -> 1 -> 4 and so on.

A STOP file lets a job save and leave; the next one, of another shape, goes on from there, and so on until the run
has finished. On another number of ranks floats are added in another order, and dropout draws other numbers, so bytes
cannot be compared. What must hold is compared: each step once, with the same tokens and samples as alone; and the
losses, which without dropout differ by rounding only.
"""

from __future__ import annotations

import math
import time
from random import Random

from hpcgpt.drill import compare
from hpcgpt.drill.drill import Drill, Size
from hpcgpt.drill.injector import FailedError, Strike
from hpcgpt.drill.report import RoundReport
from hpcgpt.drill.testbed_lab import LabPlace
from hpcgpt.drill.watched_run import Watched
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder

# Nodes and ranks a node.
SHAPES = ((2, 2), (2, 1), (1, 1), (1, 2), (1, 4), (4, 1))
# Relative. Rounding in float32 grows with every step; a wrong sample shows in the second digit of a loss.
TOLERANCE = 5e-3
CHANGES = 5


def drill(whole: Drill) -> None:
    place = whole.place
    if not isinstance(place, LabPlace):
        raise UserError("--elastic needs a lab: jobs of several shapes are submitted")
    whole.kinds.clear()
    whole.report.kinds = {"another shape": "STOP, then a job with another number of ranks"}
    whole.dropout = 0.0  # each rank has its own random numbers
    size = whole.size()
    baseline, whole.report.baseline_s = whole.alone("alone", size)
    whole.report.setting = {"place": place.shape, "steps of a run": size.steps, "dropout": 0, "tolerance": TOLERANCE}
    random, started_at = Random(whole.options.seed), time.monotonic()
    run = Watched(place.disk.folder / "elastic")
    stop = run.folder / "STOP"
    shape, told = SHAPES[0], []
    for number in range(1, CHANGES + 2):
        nodes, tasks = shape
        told.append(f"{nodes}x{tasks}")
        words = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--gpus-per-node=0")
        job = place.start("elastic", [str(whole.config)], shape=words)
        before, resumed_at = run.position()[0], time.time()
        until = size.steps if number > CHANGES else size.steps * number // (CHANGES + 1) + random.randrange(5)
        _wait(whole, place, job, run, until)
        rows = [row for row in run.tail() if row["time"] > resumed_at]
        strike = Strike(
            1, resumed_at - time.time() + time.monotonic() - whole.began_at, "another shape", told[-1], "came back",
            before, back_s=rows[0]["time"] - resumed_at if rows else None, lost_steps=0,
        )  # fmt: skip
        whole.report.strikes.append(strike)
        whole.say(f"{told[-1]} ranks: step {before:,} to {run.position()[0]:,}")
        if number > CHANGES:
            break
        stop.touch()
        _wait_until_over(whole, place, job)
        stop.unlink()
        shape = random.choice([other for other in SHAPES if other[0] * other[1] != nodes * tasks])
    _wait_until_over(whole, place, job)
    problems = [] if place.state(job) == "finished" else [f"the run was given up:\n{place.last_words(job)}"]
    if not problems:
        problems, largest = differences(run, Watched(baseline), size)
        whole.report.setting["largest difference of a loss"] = f"{largest:.1e}, relative"
    whole.report.proves = "each step once, the same samples, losses as alone but for rounding"
    wandb_problems, about_wandb = compare.wandb_differences(run.folder, place.wandb, size.steps)
    whole.report.rounds.append(
        RoundReport(
            1,
            "low",
            len(run.starts()),
            time.monotonic() - started_at,
            len(told),
            problems + wandb_problems,
            about_wandb,
        )
    )


def differences(run: Watched, alone: Watched, size: Size) -> tuple[list[str], float]:
    """Steps, tokens and samples must be equal, and losses within rounding; also the largest relative difference."""
    found = run_folder.read_rows(run.folder / "metrics.jsonl")
    expected = run_folder.read_rows(alone.folder / "metrics.jsonl")
    keys = ("step", "tokens", "samples", "train/lr")
    if [[row[key] for key in keys] for row in found] != [[row[key] for key in keys] for row in expected]:
        return [f"metrics.jsonl: steps, tokens, samples or rates are not those of {size.steps:,} steps alone"], math.nan
    problems, largest = [], 0.0
    for row, other in zip(found, expected, strict=True):
        for key in ("train/loss", "val/loss"):
            if key in other:
                off = abs(row[key] - other[key]) / other[key]
                largest = max(largest, off)
                if off > TOLERANCE:
                    problems.append(f"step {row['step']:,} has {key} {row[key]}, and alone it was {other[key]}")
    return problems[:3], largest


def _wait(whole: Drill, place: LabPlace, job: str, run: Watched, until: int) -> None:
    """Until step `until`, or the job's end."""
    seen, seen_at = run.position(), time.monotonic()
    while run.position()[0] < until and not place.over(job):
        if (now := run.position()) != seen:
            seen, seen_at = now, time.monotonic()
        if time.monotonic() - seen_at > whole.options.limit_s:
            raise FailedError(f"no step for {whole.options.limit_s:.0f} s:\n{place.last_words(job)}")
        time.sleep(0.3)


def _wait_until_over(whole: Drill, place: LabPlace, job: str) -> None:
    deadline = time.monotonic() + whole.options.limit_s
    while not place.over(job):
        if time.monotonic() > deadline:
            raise FailedError(f"job {job} did not leave within {whole.options.limit_s:.0f} s")
        time.sleep(0.3)
