"""The elastic drill: the number of ranks changes between attempts, 4 -> 2 -> 1 -> 4 and so on.

A STOP file makes a job save and exit; the next one, with another number of ranks, continues from there, until the run
has finished. Another number of ranks adds floats in another order, and dropout draws other numbers, so bytes cannot be
compared. Compared are steps, tokens and samples, which must equal those of the undisturbed run, and the losses, which
without dropout differ only by rounding.
"""

from __future__ import annotations

import math
import time
from random import Random

from hpcgpt.drill import compare
from hpcgpt.drill.drill import Drill, RunLength
from hpcgpt.drill.injector import DrillError, FaultResult
from hpcgpt.drill.report import RoundReport
from hpcgpt.drill.testbed_lab import LabTestbed
from hpcgpt.drill.watched_run import WatchedRun
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder

# Nodes, and ranks per node.
SHAPES = ((2, 2), (2, 1), (1, 1), (1, 2), (1, 4), (4, 1))
# Relative. Rounding errors of float32 grow with every step; a wrong sample changes the second digit of a loss.
TOLERANCE = 5e-3
CHANGES = 5


def change_ranks(drill: Drill) -> None:
    """Train undisturbed once, then with changing numbers of ranks, and compare."""
    testbed = drill.testbed
    if not isinstance(testbed, LabTestbed):
        raise UserError("--elastic needs a lab: it submits jobs with different numbers of ranks")
    drill.kinds.clear()
    drill.report.kinds = {"another shape": "STOP, then a job with another number of ranks"}
    drill.dropout = 0.0  # each rank has its own random numbers
    size = drill.size()
    baseline, drill.report.baseline_s = drill.train_undisturbed("alone", size)
    drill.report.setting = {"place": testbed.shape, "steps of a run": size.steps, "dropout": 0, "tolerance": TOLERANCE}
    random, started_at = Random(drill.options.seed), time.monotonic()
    run = WatchedRun(testbed.disk.folder / "elastic")
    stop = run.folder / "STOP"
    shape, used = SHAPES[0], []
    for number in range(1, CHANGES + 2):
        nodes, tasks = shape
        used.append(f"{nodes}x{tasks}")
        flags = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--gpus-per-node=0")
        job = testbed.start("elastic", [str(drill.config)], shape=flags)
        before, resumed_at = run.position()[0], time.time()
        until = size.steps if number > CHANGES else size.steps * number // (CHANGES + 1) + random.randrange(5)
        _wait(drill, testbed, job, run, until)
        rows = [row for row in run.tail() if row["time"] > resumed_at]
        result = FaultResult(
            1, resumed_at - time.time() + time.monotonic() - drill.began_at, "another shape", used[-1], "came back",
            before, back_s=rows[0]["time"] - resumed_at if rows else None, lost_steps=0,
        )  # fmt: skip
        drill.report.faults.append(result)
        drill.log(f"{used[-1]} ranks: step {before:,} to {run.position()[0]:,}")
        if number > CHANGES:
            break
        stop.touch()
        _wait_until_over(drill, testbed, job)
        stop.unlink()
        shape = random.choice([other for other in SHAPES if other[0] * other[1] != nodes * tasks])
    _wait_until_over(drill, testbed, job)
    problems = [] if testbed.state(job) == "finished" else [f"the run was given up:\n{testbed.failure_details(job)}"]
    if not problems:
        problems, largest = differences(run, WatchedRun(baseline), size)
        drill.report.setting["largest difference of a loss"] = f"{largest:.1e}, relative"
    drill.report.proves = "each step once, the same samples, the same losses but for rounding"
    wandb_problems, about_wandb = compare.wandb_differences(run.folder, testbed.wandb, size.steps)
    drill.report.rounds.append(
        RoundReport(
            1,
            "low",
            len(run.starts()),
            time.monotonic() - started_at,
            len(used),
            problems + wandb_problems,
            about_wandb,
        )
    )


def differences(run: WatchedRun, alone: WatchedRun, size: RunLength) -> tuple[list[str], float]:
    """List what differs beyond rounding, and return the largest relative difference of a loss."""
    found = run_folder.read_rows(run.folder / "metrics.jsonl")
    expected = run_folder.read_rows(alone.folder / "metrics.jsonl")
    keys = ("step", "tokens", "samples", "train/lr")
    if [[row[key] for key in keys] for row in found] != [[row[key] for key in keys] for row in expected]:
        return [
            f"metrics.jsonl: steps, tokens, samples or rates are not those of the undisturbed {size.steps:,} steps"
        ], math.nan
    problems, largest = [], 0.0
    for row, other in zip(found, expected, strict=True):
        for key in ("train/loss", "val/loss"):
            if key in other:
                off = abs(row[key] - other[key]) / other[key]
                largest = max(largest, off)
                if off > TOLERANCE:
                    problems.append(f"step {row['step']:,} has {key} {row[key]}, undisturbed it was {other[key]}")
    return problems[:3], largest


def _wait(drill: Drill, testbed: LabTestbed, job: str, run: WatchedRun, until: int) -> None:
    """Wait until step `until`, or the job's end."""
    seen, seen_at = run.position(), time.monotonic()
    while run.position()[0] < until and not testbed.over(job):
        if (now := run.position()) != seen:
            seen, seen_at = now, time.monotonic()
        if time.monotonic() - seen_at > drill.options.limit_s:
            raise DrillError(f"no step for {drill.options.limit_s:.0f} s:\n{testbed.failure_details(job)}")
        time.sleep(0.3)


def _wait_until_over(drill: Drill, testbed: LabTestbed, job: str) -> None:
    deadline = time.monotonic() + drill.options.limit_s
    while not testbed.over(job):
        if time.monotonic() > deadline:
            raise DrillError(f"job {job} did not exit within {drill.options.limit_s:.0f} s")
        time.sleep(0.3)
