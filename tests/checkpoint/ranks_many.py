"""The program of test_many_ranks: ``-m tests.checkpoint.ranks_many FOLDER RANKS``; prints a report as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import layout, load
from hpcgpt.config.options import Model
from hpcgpt.distributed.world import Ranks
from hpcgpt.storage.lease import Lease, acquire
from tests.checkpoint.thread_ranks import SMALL, Counter, content, made, on_threads, save


class Run:
    """A run folder of its own, with one checkpoint that `ranks` ranks have saved into at most `files` files."""

    def __init__(self, folder: Path, ranks: int, sharded: bool, files: int, shape: Model = SMALL) -> None:
        (folder / "checkpoints").mkdir(parents=True)
        self.shape, self.lease = shape, acquire(folder, "")
        self.checkpoints = folder / "checkpoints"
        self.counter = Counter(folder)

        def work(here: Ranks) -> Path:
            return save(folder, here, self._of(here), sharded, files, shape)

        self.path = on_threads(ranks, work)[0]

    def loaded(self, ranks: int, sharded: bool) -> list[dict[str, Any]]:
        """Return for each rank what it has read, and whether it has what was saved."""

        def work(here: Ranks) -> dict[str, Any]:
            model, optimizer = made(self.shape, here, sharded, seed=5)
            self.counter.start()
            chosen = load.newest_valid(self.checkpoints, here, self._of(here))
            assert chosen is not None
            checked = self.counter.reads()
            load.load(chosen, model, optimizer, here)
            read = self.counter.reads()
            same = content(model, optimizer, here) == content(*made(self.shape, here, sharded, seed=4), here)
            return {"same": same, **asdict(read), "checking": asdict(checked)}

        return on_threads(ranks, work)

    def errors(self, ranks: int, sharded: bool, path: Path) -> list[str]:
        """Return the error that each rank gets when it loads the checkpoint `path`."""

        def work(here: Ranks) -> str:
            model, optimizer = made(self.shape, here, sharded, seed=5)
            try:
                load.load(path, model, optimizer, here)
            except (OSError, ValueError) as error:
                return str(error)
            return ""

        return on_threads(ranks, work)

    def refused(self, ranks: int) -> list[str]:
        """Return each rank's error when the ranks choose a checkpoint, and there is no valid one."""

        def work(here: Ranks) -> str:
            try:
                return str(load.newest_valid(self.checkpoints, here, None))
            except ValueError as error:
                return str(error)

        return on_threads(ranks, work)

    def _of(self, here: Ranks) -> Lease | None:
        return self.lease if here.world.is_first else None


def main(folder: Path, many: int) -> None:
    """Save with `many` ranks into 8 files and with 8 into as many, load with others, then damage the files."""
    report: dict[str, Any] = {}
    for sharded in (False, True):
        mode = "fsdp" if sharded else "ddp"
        run = Run(folder / mode, many, sharded, files=8)
        report[mode] = {
            "path": str(run.path),
            "loads": {
                f"{ranks} {with_shards}": run.loaded(ranks, with_shards) for ranks, with_shards in loads(sharded, many)
            },
        }
        own = Run(folder / f"{mode} own", 8, sharded, files=64)
        report[f"{mode} own"] = {"version": json.loads((own.path / "manifest.json").read_text())["version"],
                                 "loads": {"8": own.loaded(8, sharded), "5": own.loaded(5, sharded)}}  # fmt: skip
        share = own.path / layout.share_name(6, 8)
        os.truncate(share, share.stat().st_size - 100)
        report[f"{mode} own"]["errors"] = own.errors(8, sharded, own.path)
        last = run.path / layout.share_name(7, 8)
        body = bytearray(last.read_bytes())
        body[-1] ^= 1  # of the padding of the last rank
        last.write_bytes(body)
        report[mode]["refused"] = run.refused(8)
    print(json.dumps(report))


def loads(sharded: bool, many: int) -> Sequence[tuple[int, bool]]:
    """Return the numbers and kinds of ranks that load what `many` ranks of this kind have saved."""
    if sharded:
        return ((1, False), (3, True), (8, False), (8, True), (many, True), (many + 6, False))
    return ((1, False), (3, True), (many, False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
