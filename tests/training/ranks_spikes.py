"""What test_spikes runs, on 1 or 2 ranks: ``tests.training.ranks_spikes TOLD FAULTS TRAIN_ARGUMENTS``.

The program itself, in which a micro-batch's loss goes wrong. FAULTS is JSON; every key may be left out:

    nan      [rank, global batch, micro-step]: its loss is NaN
    grad     [rank, global batch, micro-step]: its loss is a number, and its gradient is not
    row      global batch: of all gradients that of the last position's embedding alone is no finite number
    spikes   global batches: the losses of all their micro-batches are three times as large
    leaps    rank: only its losses leap, to ten times
    late     true: figures are read a step late, as on a GPU
    stop     global batch: SIGUSR1 when it has been asked for
    kill     global batch: SIGKILL then
    folder   [global batch, path]: rank 0 puts a folder in the place of this file then
    slow_s   a checkpoint takes that many seconds more to load, where the run goes back to it

Each rank writes TOLD/batches_R.json at its end: the numbers of the global batches that it has trained on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpcgpt import cli, train
from hpcgpt.data import prefetch
from hpcgpt.distributed import world
from hpcgpt.training import engine, resume


def main(folder: Path, faults: dict[str, Any], arguments: list[str]) -> None:
    rank = world.discover().rank
    asked: list[int] = []
    micro_step = 0

    def batches(self: prefetch.Prefetcher, number: int, count: int | None = None) -> Any:
        nonlocal micro_step
        if count is None:  # else it is the warm-up
            asked.append(number)
            micro_step = 0
            (folder / f"batches_{rank}.json").write_text(json.dumps(asked))
            if faults.get("stop") == number:
                os.kill(os.getpid(), signal.SIGUSR1)
            if faults.get("kill") == number:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0 and number == faults.get("folder", [None])[0]:
                Path(faults["folder"][1]).unlink()
                Path(faults["folder"][1]).mkdir()
        return real_batches(self, number, count)

    def hit(_model: object, inputs: tuple[Tensor, ...], loss: Tensor) -> Tensor:
        nonlocal micro_step
        if len(inputs) < 2 or not asked or not torch.is_grad_enabled():
            return loss
        place, micro_step = [rank, asked[-1], micro_step], micro_step + 1
        if place == faults.get("nan"):
            return loss * float("nan")
        if place == faults.get("grad"):
            loss.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
        leaps = asked[-1] in faults.get("spikes", ()) and rank == faults.get("leaps", rank)
        return loss * (10 if "leaps" in faults else 3) if leaps else loss

    def hit_row(_module: object, _inputs: object, embedded: Tensor) -> None:
        """The last row of 32: where two ranks have shares, the first one has nothing of it."""
        if asked and torch.is_grad_enabled() and asked[-1] == faults.get("row"):
            factors = torch.ones_like(embedded)
            factors[..., -1, :] = float("inf")
            embedded.register_hook(lambda gradient: gradient * factors)  # type: ignore[no-untyped-call]

    def build(self: engine.Engine, *given: Any) -> None:
        real_build(self, *given)
        self.model.local.register_forward_hook(hit)
        self.model.local.get_submodule("position_embedding").register_forward_hook(hit_row)
        self.defers_metrics = bool(faults.get("late"))

    def load(self: resume.Restorer, path: Path) -> None:
        if asked:  # else it is where the attempt continues
            time.sleep(faults.get("slow_s", 0))
        real_load(self, path)

    real_load, resume.Restorer.load = resume.Restorer.load, load  # type: ignore[method-assign]
    real_batches, prefetch.Prefetcher.batches = prefetch.Prefetcher.batches, batches  # type: ignore[method-assign]
    real_build, engine.Engine.__init__ = engine.Engine.__init__, build  # type: ignore[method-assign, assignment]
    sys.argv[1:] = arguments
    cli.run(train.main)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
