"""Preempt a job again and again, on the lab's Slurm: do its checkpoints accumulate, and does the job end?

    python benchmarks/preempted.py --every 40 --minutes 30
    python benchmarks/preempted.py --every 20 --minutes 10 --max-idle 4      (starts without progress)

One rank trains a small model. --every seconds after each start of the job, a job of a higher partition takes its node.
The checkpoints are counted several times a second. At the end it prints a table; status 1 if at any time there were
more checkpoints than the settings keep plus the one just saved, or if the job was given up although its last starts
made progress, or was not given up although they made none.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hpcgpt.drill.drill import make_shards
from hpcgpt.drill.testbed_lab import LabTestbed
from hpcgpt.run import run_folder
from hpcgpt.slurm import restart_history

CONFIG = """
[run]
dir = "{runs}"
device = "cpu"
threads = 1
[data]
dir = "{data}"
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
[schedule]
warmup_steps = 10
[train]
steps = 1000000
global_batch = 16
micro_batch = 16
[checkpoint]
every = {save_every}
keep_last = {keep_last}
keep_best = false
[eval]
every = 0
[sample]
tokens = 0
[tracking]
wandb = "disabled"
[requeue]
max_idle = {max_idle}
"""
SHAPE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--nodelist=n1", "--exclusive")
LOOK_S = 0.2


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    home = Path(options.dir or tempfile.mkdtemp(prefix="preempted-")).resolve()
    home.mkdir(parents=True, exist_ok=True)
    with LabTestbed(options.name, options.subnet, home) as testbed:
        make_shards(home, home / "shards", print)
        config = home / "run.toml"
        config.write_text(CONFIG.format(runs=home / "runs", data=home / "shards", **vars(options)))
        job = testbed.start("preempted", [str(config)], options.partition, SHAPE)
        most, preemptions = watch(testbed, job, home / "runs" / "preempted", options)
        testbed.slurm("scancel", job)
    return report(home, job, most, preemptions, options)


def watch(testbed: LabTestbed, job: str, folder: Path, options: argparse.Namespace) -> tuple[int, int]:
    """Preempt until the time is over or the job has ended. Returns the maximum of checkpoints, and the preemptions."""
    deadline = time.monotonic() + 60 * options.minutes
    most = preemptions = begun = 0
    preempt_at = float("inf")
    while time.monotonic() < deadline and testbed.state(job) not in ("over", "finished"):
        starts = len([event for event in run_folder.events(folder) if event["event"] == "job"])
        if starts > begun:
            begun, preempt_at = starts, time.monotonic() + options.every
        if time.monotonic() >= preempt_at:
            preempt_at = float("inf")
            preemptions += 1
            testbed.submit("--partition=high", "--nodelist=n1", "--exclusive", "--wrap", "true")
        look_again_at = time.monotonic() + 5  # asking Slurm costs more than looking at a folder
        while time.monotonic() < min(look_again_at, preempt_at):
            most = max(most, len(list(folder.glob("checkpoints/step_*"))))
            time.sleep(LOOK_S)
    return most, preemptions


def report(home: Path, job: str, most: int, preemptions: int, options: argparse.Namespace) -> int:
    folder = home / "runs" / "preempted"
    events = run_folder.events(folder)
    last = [event for event in events if event["event"] == "job"][-1]["job"]
    found = restart_history.starts(events, last, restart_history.newest_step(folder / "checkpoints"))
    for start in found:
        print(f"{start.job:>8}: {start.summary}{' (without progress)' if start.without_progress else ''}")
    gave_up = [event["reason"] for event in events if event["event"] == "give_up"]
    allowed = options.keep_last + 1
    print(f"{preemptions} preemptions, {len(found)} starts; at most {most} checkpoints at a time, allowed {allowed}")
    print(f"given up: {gave_up[-1]}" if gave_up else "not given up")
    ended = [start for start in found if not start.gave_up or start.gained]
    newest = ended[-options.max_idle :]
    should_give_up = len(newest) >= options.max_idle and all(start.without_progress for start in newest)
    right = most <= allowed and bool(gave_up) == should_give_up
    print("as promised" if right else f"NOT as promised; see {home} and slurm-{job}.out")
    return 0 if right else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--every", type=float, default=40.0, help="seconds from a start to its preemption; default: %(default)g")
    add("--minutes", type=float, default=30.0, help="default: %(default)g")
    add("--partition", choices=("low", "grace"), default="low", help="low: Slurm requeues; grace: we do")
    add("--keep-last", type=int, default=2, help="default: %(default)s")
    add("--save-every", type=int, default=500, help="steps; default: %(default)s")
    add("--max-idle", type=int, default=10, help="default: %(default)s")
    add("--name", default="hpcgpt-lab", help="the lab's name; default: %(default)s")
    add("--subnet", default="10.77.0", help="the lab's subnet, if it has to be brought up; default: %(default)s")
    add("--dir", default="", help="default: a new temporary folder")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
