"""The program of test_collectives: ``python -m tests.distributed.ranks_collectives FOLDER [RANK]``.

Each rank makes every collective call, without errors and with the errors of two ranks, and writes what it got to
FOLDER/<rank>.json, with its connections to other ranks. With RANK this rank ends once all are connected, and the others
make a call, and write their error.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from hpcgpt import cli
from hpcgpt.distributed import collectives, rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.errors import UserError


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0])
    if argv[1:]:
        _lose(folder, int(argv[1]))
    ranks = _connect(folder)
    rank = ranks.world.rank
    found: dict[str, Any] = {
        "run": collectives.run_on_rank0(ranks, lambda: f"of {rank}"),
        "make": collectives.make_on_rank0(ranks, lambda: rank),
        "to_rank0": collectives.gather_to_rank0(ranks, lambda: rank * 10),
        "from_all": collectives.gather_from_all(ranks, lambda: rank * 10),
        "merged": collectives.merge_on_all(ranks, lambda: f"{rank} ", str.__add__),
        "distinct": sorted(collectives.distinct_on_all(ranks, lambda: rank % 2)),
        "run_fails": _error(lambda: collectives.run_on_rank0(ranks, lambda: _fail(ranks, 0))),
        "to_rank0_fails": _error(lambda: collectives.gather_to_rank0(ranks, lambda: _fail(ranks, 1, 3))),
        "from_all_fails": _error(lambda: collectives.gather_from_all(ranks, lambda: _fail(ranks, 1, 3))),
        "merge_fails": _error(lambda: collectives.distinct_on_all(ranks, lambda: _fail(ranks, 1, 3))),
        "large": len(collectives.run_on_rank0(ranks, lambda: bytes(10_000_000))),
    }
    found["connections"] = _connections_to_ranks()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    collectives.gather_from_all(ranks, lambda: None)  # no rank leaves before all have counted
    rendezvous.disconnect()
    return 0


def _connect(folder: Path) -> Ranks:
    return rendezvous.connect(world.discover(), torch.device("cpu"), folder, "gloo", 60.0)


def _lose(folder: Path, ending: int) -> NoReturn:
    """Connect, end as rank `ending`, and as another rank write the error."""

    def call() -> None:
        ranks = _connect(folder)
        if ranks.world.rank == ending:
            os._exit(9)
        for _ in range(2):
            collectives.gather_from_all(ranks, lambda: 1)

    (folder / f"{world.discover().rank}.json").write_text(json.dumps(_error(call)))
    os._exit(0)


def _fail(ranks: Ranks, *failing: int) -> int:
    rank = ranks.world.rank
    if rank in failing:
        raise UserError(f"rank {rank} fails") if rank else FileNotFoundError(2, "rank 0 fails")
    return rank


def _error(call: Callable[[], object]) -> list[Any]:
    try:
        return [call()]
    except Exception as error:  # any: it is compared
        return [type(error).__name__, str(error), vars(error).get("from_rank")]


def _connections_to_ranks() -> int:
    """Return how many connections this process has open, without those of the store."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    found = 0
    for path in Path("/proc/self/fd").iterdir():
        if not (path.is_symlink() and str(path.readlink()).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as connection, suppress(OSError):  # one that listens
            if connection.family == socket.AF_INET:
                found += store.port not in (connection.getsockname()[1], connection.getpeername()[1])
    return found


if __name__ == "__main__":
    cli.run(main)
