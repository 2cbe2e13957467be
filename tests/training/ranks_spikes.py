"""The program of test_spikes on 1 or 2 ranks: ``tests.training.ranks_spikes OUT FAULTS TRAIN_ARGUMENTS``.

It is `hpcgpt.train` with injected losses and gradients. FAULTS is JSON; every key is optional:

    nan      [rank, global batch, micro-step]: its loss is NaN
    nans     global batches: the losses of all their micro-batches are NaN
    most     so many events of a kind are recorded
    grad     [rank, global batch, micro-step]: its loss is finite, its gradient is not
    row      global batch: of all gradients only that of the last position's embedding is not finite
    spikes   global batches: the losses of all their micro-batches are three times as large
    leaps    rank: only its losses spike, to ten times
    late     true: metrics are read one step late, as on a GPU
    stop     global batch: SIGUSR1 once it has been requested
    kill     global batch: SIGKILL then
    folder   [global batch, path]: rank 0 replaces this file by a folder then
    slow_s   seconds that loading a checkpoint takes longer at a rollback

Each rank writes OUT/batches_R.json: the numbers of the global batches that it has trained on.
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
from hpcgpt.training import engine, reporter, resume


def main(folder: Path, faults: dict[str, Any], arguments: list[str]) -> None:
    rank = world.discover().rank
    asked: list[int] = []
    micro_step = 0

    def batches(self: prefetch.Prefetcher, number: int, count: int | None = None) -> Any:
        nonlocal micro_step
        if count is None:  # not the warm-up
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
        position, micro_step = [rank, asked[-1], micro_step], micro_step + 1
        if position == faults.get("nan") or asked[-1] in faults.get("nans", ()):
            return loss * float("nan")
        if position == faults.get("grad"):
            loss.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[no-untyped-call]
        spikes = asked[-1] in faults.get("spikes", ()) and rank == faults.get("leaps", rank)
        return loss * (10 if "leaps" in faults else 3) if spikes else loss

    def hit_row(_module: object, _inputs: object, embedded: Tensor) -> None:
        """Hit the last row of 32: where two ranks have shares, rank 0 has nothing of it."""
        if asked and torch.is_grad_enabled() and asked[-1] == faults.get("row"):
            factors = torch.ones_like(embedded)
            factors[..., -1, :] = float("inf")
            embedded.register_hook(lambda gradient: gradient * factors)  # type: ignore[no-untyped-call]

    def build(self: engine.Engine, *given: Any) -> None:
        real_build(self, *given)
        self.model.gpt.register_forward_hook(hit)
        self.model.gpt.get_submodule("position_embedding").register_forward_hook(hit_row)
        self.defers_metrics = bool(faults.get("late"))

    def load(self: resume.Restorer, path: Path) -> None:
        if asked:  # a rollback, not the load at the start
            time.sleep(faults.get("slow_s", 0))
        real_load(self, path)

    real_load, resume.Restorer.load = resume.Restorer.load, load  # type: ignore[method-assign]
    real_batches, prefetch.Prefetcher.batches = prefetch.Prefetcher.batches, batches  # type: ignore[method-assign]
    real_build, engine.Engine.__init__ = engine.Engine.__init__, build  # type: ignore[method-assign, assignment]
    reporter.MOST_OF_A_KIND = faults.get("most", reporter.MOST_OF_A_KIND)
    sys.argv[1:] = arguments
    cli.run(train.main)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
