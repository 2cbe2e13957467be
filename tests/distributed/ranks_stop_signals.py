"""The program of test_stop_signals on 4 ranks: ``-m tests.distributed.ranks_stop_signals OUT``.

Each rank writes OUT/rank_R.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.stop_signals import StopFlag, elected
from hpcgpt.distributed.world import Ranks

# The signals that each rank gets, one case after the other.
CASES: dict[str, dict[int, list[signal.Signals]]] = {
    "no rank": {},
    "the last rank alone": {3: [signal.SIGUSR1]},
    "two ranks with different reasons": {1: [signal.SIGINT], 2: [signal.SIGTERM]},
    "every rank the same": {rank: [signal.SIGUSR2] for rank in range(4)},
    "one rank twice": {0: [signal.SIGTERM, signal.SIGTERM]},
}


def agreed(ranks: Ranks, out: Path) -> dict[str, str]:
    reported = {}
    for name, sent in CASES.items():
        flag = StopFlag(None, 60.0, {})
        flag.install()
        for number in sent.get(ranks.world.rank, []):
            os.kill(os.getpid(), number)
        reported[name] = flag.agree(ranks).name
        votes = torch.tensor([2.5, *flag.votes(ranks)])
        dist.all_reduce(votes)  # as with the loss of a step
        assert elected(votes[1:].tolist()).name == reported[name]
    stop_file = out / "STOP"
    if ranks.world.is_first:
        stop_file.touch()
    reported["a file that only rank 0 looks for"] = (
        StopFlag(stop_file if ranks.world.is_first else None, 60.0, {}).agree(ranks).name
    )
    for name, rank in {"the clock of rank 0": 0, "the clock of another rank": 2}.items():
        end = {"SLURM_JOB_END_TIME": "1"} if ranks.world.rank == rank else {}
        reported[name] = StopFlag(None, 60.0, end).agree(ranks).name
    return reported


def rounds_until_stop(ranks: Ranks) -> int:
    """Return in which round the ranks stop, if rank 2 gets a signal at a random moment."""
    flag = StopFlag(None, 60.0, {})
    flag.install()
    if ranks.world.rank == 2:
        threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    rounds = 0
    while not flag.agree(ranks) and rounds < 200_000:
        rounds += 1
    return rounds


def main(out: Path) -> None:
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    reported = {"agreed": agreed(ranks, out), "rounds": [rounds_until_stop(ranks) for _ in range(5)]}
    (out / f"rank_{here.rank}.json").write_text(json.dumps(reported))
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
