"""``python -m hpcgpt.drill --minutes M --seed S``: inject faults, and check that the result is the same.

A small model is trained on real text, once undisturbed, then repeatedly while faults drawn from the seed are injected:
processes are killed, jobs preempted, nodes cut off the network, checkpoints corrupted, the disk filled
(hpcgpt/drill/faults.py and slurm_faults.py list all of them). Every run has to recover and finish by itself. Then its
weights, optimizer state, random generators and metrics are compared with the undisturbed run, byte for byte. All runs
report to a stand-in for the W&B server (hpcgpt/drill/wandb_server.py), which must have each row once at the end.

``--on lab``, the default if a lab can be started, uses the real Slurm of slurm/lab: two nodes with two ranks each.
``--on here`` uses two ranks on this machine, without Slurm; the drill then does what the batch script does.
``--elastic`` is another drill: the number of ranks changes between attempts, and samples and losses are compared.

The drill ends its own faults after a while (a network cable is plugged in again), as a person would; it never repairs
the job. requeue.max_crashes is raised, since the drill's faults are more frequent than any cluster's.

Exit status 0: all runs are identical. 1: a run differs, or did not recover. 2: a mistake in the command.

No torch in here.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.drill import elastic, faults, slurm_faults, testbed_here
from hpcgpt.drill.drill import Drill
from hpcgpt.drill.faults import FaultKind
from hpcgpt.drill.testbed_lab import why_no_lab
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.slurm import code_snapshot

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one when the terminal or the ssh session has ended


@streams.continue_without_reader()
def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    if options.minutes <= 0 or options.steps < 0:
        raise UserError("--minutes must be greater than 0, and --steps at least 0")
    no_lab = why_no_lab() if options.on != "here" else ""
    if options.on == "lab" and no_lab:
        raise UserError(f"--on lab: {no_lab}. Without a Slurm: --on here")
    where = "here" if options.on == "here" or no_lab else "lab"
    kinds = chosen(where, options.faults)
    home = Path(options.dir or f"runs/drills/{options.seed}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    if home.exists():
        raise UserError(f"{home} exists already: the drill creates its folder, choose another --dir")
    # Jobs of the lab start in a folder of the drill, those here in this one.
    code_snapshot.check_imported(Path.cwd() if where == "here" else Path(home.anchor))
    home.mkdir(parents=True)
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN or number != signal.SIGHUP:  # nohup: it outlives the session
            signal.signal(number, _interrupted)
    if no_lab:
        print(f"no lab: {no_lab}; so this drill runs without Slurm")
    return Drill(options, where, kinds, home).run(elastic.change_ranks if options.elastic else Drill.rounds)


def chosen(where: str, names: str = "") -> dict[str, FaultKind]:
    """Return the kinds of faults of a testbed: all, or those in a list with commas."""
    slurm = slurm_faults.KINDS if where == "lab" else testbed_here.KINDS
    known = {kind.name: kind for kind in (*faults.KINDS, *slurm)}
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(f"--faults: no fault '{unknown[0]}' on {where}; there are {', '.join(known)}")
    return {name: known[name] for name in wanted}


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt once: the cleanup that follows must not be interrupted."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="hpcgpt drill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--minutes", type=float, default=20.0, help="inject faults for this long; default: %(default)g")
    add("--seed", type=int, default=1, help="of the faults and of the run; default: %(default)s")
    add("--on", choices=("auto", "lab", "here"), default="auto", help="default: the lab if one can be started")
    add("--name", default="hpcgpt-lab", help="the lab's name; default: %(default)s")
    add("--subnet", default="10.77.0", help="the lab's subnet, if it has to be started; default: %(default)s")
    add("--ranks", type=int, choices=(1, 2), default=2, help="without a lab; default: %(default)s")
    add("--faults", default="", metavar="A,B,...", help="only these kinds; default: all")
    add("--steps", type=int, default=0, help="length of a run; default: a bit over a minute, measured in a short trial")
    add("--every", type=int, default=0, help="steps between checkpoints; default: about 3 s")
    add("--limit-s", type=float, default=240.0, help="longest wait for the next step, in seconds; default: %(default)g")
    add("--elastic", action="store_true", help="change the number of ranks between attempts")
    add(
        "--data",
        type=paths.not_empty,
        metavar="DIR",
        help="token shards to train on; default: made from Python's sources",
    )
    add("--dir", type=paths.not_empty, help="the drill's folder; default: runs/drills/SEED-TIME")
    add("--out", type=paths.not_empty, metavar="DIR", help="folder of the report; default: the drill's folder")
    add("--keep", action="store_true", help="also keep the checkpoints of identical runs")
    return made


if __name__ == "__main__":
    cli.run(main)
