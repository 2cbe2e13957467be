"""``hpcgpt train``, recording what each rank reads to check a checkpoint, and when newer ones are moved:
``torchrun -m tests.checkpoint.ranks_go_back OUT TRAIN_ARGUMENTS``. Each rank adds lines to OUT/rank_R.txt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from hpcgpt import cli, train
from hpcgpt.checkpoint import go_back, layout
from hpcgpt.checkpoint.parts import Part
from hpcgpt.distributed import world
from hpcgpt.storage.lease import Lease


def main(out: Path) -> None:
    log = (out / f"rank_{world.discover().rank}.txt").open("a", buffering=1)
    check, move = layout.check_checksums, go_back.set_aside_newer

    def checked(checkpoint: Path, parts: Iterable[Part]) -> str:
        parts = list(parts)
        log.write(f"{checkpoint.name} {sum(part.bytes for part in parts)}\n")
        return check(checkpoint, parts)

    def moved(run: Path, step: int, lease: Lease) -> str:
        log.write("move 0\n")
        return move(run, step, lease)

    layout.check_checksums, go_back.set_aside_newer = checked, moved


if __name__ == "__main__":
    main(Path(sys.argv.pop(1)))
    cli.run(train.main)
