"""The program of test_collectives on 2 ranks: ``-m tests.training.ranks_collectives OUT FAULTS TRAIN_ARGUMENTS``.

It is `hpcgpt.train`, which counts the collectives of each turn of its loop. The save of step SAVED is held back: its
first stage ends in step WRITTEN, its second in step COMMITTED, the others after that. FAULTS is JSON; every key is
optional:

    late    true: metrics are read one step late, as on a GPU
    stop    step: rank 1 alone gets SIGUSR1 at the end of its optimizer's step

Each rank writes OUT/rank_R.json: for each turn, by step, how many collectives of each kind it had, and how many numbers
each of its small all-reduces carried.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from hpcgpt import cli, train
from hpcgpt.checkpoint import safetensors_writer
from hpcgpt.distributed import world
from hpcgpt.run import metrics_file
from hpcgpt.training import engine
from hpcgpt.training.loop import Loop
from tests.training.traces import trace_events

SAVED, WRITTEN, COMMITTED = 7, 10, 13
SMALL = 100  # numbers; gradients are more


def hold_back(owner: Any, name: str, gate: Path) -> None:
    """Let calls of a function wait until there is a file."""
    real = getattr(owner, name)

    def held(*arguments: Any) -> Any:
        while not gate.exists():
            time.sleep(0.001)
        return real(*arguments)

    setattr(owner, name, held)


class TurnCounter:
    """Profiles the loop; each turn is from the beginning of a step to that of the next one."""

    def __init__(self) -> None:
        self._running = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self._has_begun = False

    def turn(self, step: int) -> None:
        """Begin the turn of this step."""
        if not self._has_begun:  # not before: it keeps references to tensors, which fsdp replaces
            self._running.start()
            self._has_begun = True
        with record_function(f"turn {step}"):
            pass

    def end(self) -> dict[int, dict[str, Any]]:
        """Return what was counted in each turn, by step."""
        self._running.stop()
        turns: dict[int, dict[str, Any]] = {}
        kinds, small = Counter[str](), list[int]()  # before the first turn
        for event in trace_events(self._running):
            if event["name"].startswith("turn "):
                kinds, small = Counter(), []
                turns[int(event["name"].removeprefix("turn "))] = {"kinds": kinds, "small": small}
            elif event["name"].startswith("c10d::"):
                kinds[event["name"].removeprefix("c10d::")] += 1
            elif event["name"] == "gloo:all_reduce" and (count := math.prod(event["args"]["Input Dims"][0])) < SMALL:
                small.append(count)
        return turns


def main(out: Path, faults: dict[str, Any], arguments: list[str]) -> None:
    rank = world.discover().rank
    counter = TurnCounter()
    gates = {step: out / f"gate_{step}" for step in (WRITTEN, COMMITTED)}

    def stepping(self: Loop) -> Any:
        step = self.state.step + 1
        counter.turn(step)
        if step in gates:
            gates[step].touch()
            under_way = self.checkpointer.saver._save
            assert under_way is not None
            under_way.work._thread.join()  # so that this rank votes for the end of the stage in this step
        return real_step(self)

    def run(self: Loop) -> Any:
        reason = real_run(self)
        for gate in gates.values():
            gate.touch()
        (out / f"rank_{rank}.json").write_text(json.dumps(counter.end()))
        return reason

    def build(self: engine.Engine, *given: Any) -> None:
        real_build(self, *given)
        self.defers_metrics = bool(faults.get("late"))
        steps = 0

        def hit(*_: object) -> None:
            nonlocal steps
            steps += 1
            if rank == 1 and steps == faults.get("stop"):
                os.kill(os.getpid(), signal.SIGUSR1)

        self.optimizer.register_step_post_hook(hit)

    hold_back(safetensors_writer, "write", gates[WRITTEN])
    hold_back(metrics_file.MetricsFile, "sync", gates[COMMITTED])
    real_step, Loop._step = Loop._step, stepping  # type: ignore[method-assign]
    real_run, Loop.run = Loop.run, run  # type: ignore[method-assign]
    real_build, engine.Engine.__init__ = engine.Engine.__init__, build  # type: ignore[method-assign, assignment]
    sys.argv[1:] = arguments
    cli.run(train.main)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
