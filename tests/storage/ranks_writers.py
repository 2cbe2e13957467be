"""The program of test_lease's race: ``python -m tests.storage.ranks_writers RUN_FOLDER ROUNDS SEED``.

Real processes compete for a run folder as jobs do: each acquires the lease, recovers leftovers, continues from the
newest valid checkpoint and saves step after step while its weights change. It appends "generation step
chose|committed" to RUN_FOLDER/log, with one write each. They are forked from one parent, so that torch is loaded once.
The seconds for which a process watches a stopped holder are shortened to tenths; only the waiting changes.

In each round two processes compete while the holder is killed, or stopped, at a random moment. A stopped one is
continued after the next holder has committed: it is superseded. A line of JSON reports how it ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from hpcgpt.checkpoint import layout, load, retention
from hpcgpt.checkpoint.save import Saver
from hpcgpt.config import options
from hpcgpt.storage import lease
from hpcgpt.storage.lease import acquire
from tests.checkpoint.ranks_killed import content
from tests.one_rank import ALONE

REFUSED = 2


def work(run: Path) -> int:
    try:
        lease = acquire(run, "")
    except ValueError:
        return REFUSED
    log = os.open(run / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    note(log, lease.number, 0, "acquired")
    retention.recover_leftovers(run / "checkpoints", lease)
    newest = load.newest_valid(run / "checkpoints", ALONE, lease)
    step = layout.read_state(newest).step if newest else 0
    note(log, lease.number, step, "chose")
    saver = Saver(run / "checkpoints", ALONE, lease, options.Checkpoint(keep_last=1000, keep_best=False))
    while True:
        step += 1
        saved = saver.begin(layout.State(step, lease.number, 0, 1, {}), content(step))
        if saved is not None and not saved.problem:
            note(log, lease.number, step, "found")  # another process saved it: no commit of this one
            continue
        while saved is None:
            time.sleep(0.0005)
            saved = saver.poll()
        if saved.problem:
            note(log, lease.number, step, "failed")
            step -= 1
        else:
            note(log, lease.number, step, "committed")


def note(log: int, number: int, step: int, what: str) -> None:
    """Append a line of 32 bytes, so that none crosses a page of the file: a reader, or SIGKILL, would cut it in two."""
    os.write(log, f"{number} {step} {what}".ljust(31).encode() + b"\n")


def start(run: Path, running: set[int]) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(work(run))
        finally:
            os._exit(1)
    running.add(child)
    return child


def wait(child: int, running: set[int]) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    running.remove(child)
    return status


def wait_for(run: Path, what: str, newer_than: int, children: list[int]) -> int:
    """Return the number of the attempt above `newer_than` that has logged this; fail after 90 s."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        lines = (run / "log").read_text().splitlines() if (run / "log").exists() else []
        for line in lines:
            number, _, did = line.split()
            if did == what and int(number) > newer_than:
                return int(number)
        time.sleep(0.002)
    raise AssertionError(f"no attempt newer than {newer_than} has logged {what}: {children}")


def main(run: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    lease.HEARTBEAT_S = 0.05
    (run / "checkpoints").mkdir(parents=True)
    running: set[int] = set()
    try:
        compete(run, rounds, random.Random(seed), running)
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)


def compete(run: Path, rounds: int, dice: random.Random, running: set[int]) -> None:
    holder = start(run, running)
    number = wait_for(run, "chose", 0, [holder])
    for round_number in range(rounds):
        time.sleep(dice.uniform(0.0, 0.08))
        superseded = round_number % 2 == 1
        # A stopped holder has to be watched to the end. Where it is dead, the rivals watch only each other, and on
        # busy cores a living one may not beat for a while.
        lease.WATCH_S = 0.3 if superseded else 10.0
        os.kill(holder, signal.SIGSTOP if superseded else signal.SIGKILL)
        if not superseded:
            wait(holder, running)
        rivals = [start(run, running), start(run, running)]
        newer = wait_for(run, "committed", number, rivals)
        reported = {"superseded": superseded, "number": newer, "superseded_status": None}
        if superseded:
            os.kill(holder, signal.SIGCONT)
            reported["superseded_status"] = wait(holder, running)
        winner = json.loads((run / f"generations/{newer:06d}.json").read_text())["pid"]
        (loser,) = [rival for rival in rivals if rival != winner]
        reported["loser"] = wait(loser, running)
        print(json.dumps(reported), flush=True)
        holder, number = winner, newer


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
