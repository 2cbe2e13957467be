"""The program that test_save kills: ``python -m tests.checkpoint.ranks_killed RUN_FOLDER ROUNDS SEED``.

In each round a process continues from the newest valid checkpoint and saves one after the other in the background,
while its weights change, until it gets SIGKILL at a random moment. One line of JSON per round reports the step that
it found, the newest step whose save was reported as finished, what was left under a temporary name, and which
checkpoints are damaged. The rounds are forked from one parent, so that torch is loaded once.
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
from torch import Tensor

from hpcgpt.checkpoint import layout, load, retention
from hpcgpt.checkpoint.save import Saver
from hpcgpt.config import options
from hpcgpt.storage.lease import acquire
from tests.one_rank import ALONE

LONGEST_ROUND_S = 0.12  # a save takes about a tenth of it


def content(step: int) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint of a step, half a megabyte."""
    return {f"model/{name}": torch.full((128, 128), float(step * 10 + name)) for name in range(8)}


def save_until_killed(run: Path, reports: int) -> None:
    """Write to the descriptor `reports` the step of the newest valid checkpoint (-1 if its content is wrong), and then
    each step whose save has finished.
    """
    lease = acquire(run, "")
    retention.recover_leftovers(run / "checkpoints", lease)
    newest = load.newest_valid(run / "checkpoints", ALONE, lease)
    step = layout.read_state(newest).step if newest else 0
    os.write(reports, f"{step if newest is None or holds(newest, step) else -1}\n".encode())
    saver = Saver(run / "checkpoints", ALONE, lease, options.Checkpoint(keep_last=2))
    weights = content(0)
    while True:
        step += 1
        for name, tensor in content(step).items():
            weights[name].copy_(tensor)
        saved = saver.begin(layout.State(step, step * 100, step * 10, 1, {}), weights)
        for tensor in weights.values():  # training continues at once
            tensor.fill_(-1.0)
        while saved is None:
            time.sleep(0.0005)
            saved = saver.poll()
        assert saved.problem == ""
        os.write(reports, f"{step}\n".encode())


def holds(path: Path, step: int) -> bool:
    from safetensors.torch import load_file

    tensors = load_file(path / "tensors_00000_of_00001.safetensors")
    expected = content(step)
    return set(tensors) == set(expected) and all(torch.equal(tensors[name], expected[name]) for name in expected)


def is_named_but_damaged(path: Path) -> bool:
    """Return whether it is damaged and yet has a checkpoint's name, or that of one set aside."""
    return not path.name.startswith(".") and layout.verify(path) != ""


def main(run: Path, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    (run / "checkpoints").mkdir(parents=True)
    dice = random.Random(seed)
    for _ in range(rounds):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                save_until_killed(run, writing)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading) as pipe:
            found = int(pipe.readline() or -2)
            time.sleep(dice.uniform(0.0, LONGEST_ROUND_S))
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended = [int(line) for line in pipe]
        left = sorted(path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("."))
        broken = [path.name for path in (run / "checkpoints").glob("*step_*") if is_named_but_damaged(path)]
        report = {"found": found, "saved": max([found, *ended]), "saves": len(ended), "status": status}
        print(json.dumps(report | {"left": left, "broken": broken}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
