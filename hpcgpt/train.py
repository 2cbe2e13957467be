"""``python -m hpcgpt.train [CONFIG] [--section.key value]... [--dry-run]``: pretrain, or resume a run.

This file is the command: it finds this process's rank, reads the configuration, checks what can be checked before torch
is loaded, and ends the process. An attempt is ``hpcgpt/training/attempt.py``, its loop ``hpcgpt/training/loop.py``, one
step ``hpcgpt/training/step.py``.

Exit status: 0 training is finished; 75 saved before the end, start it again; 76 another attempt has taken over the run
folder; 2 a user's mistake; any other is a failure.
"""

from __future__ import annotations

import gc
import os
import socket
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from hpcgpt import cli
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.distributed import layout, stop_signals, world
from hpcgpt.distributed.world import World
from hpcgpt.errors import InputError, NodeError, UserError, as_node_error, sentence, status_of
from hpcgpt.output import streams, terminal
from hpcgpt.run import crash_report, run_folder
from hpcgpt.slurm import job_end, scontrol
from hpcgpt.storage import lease
from hpcgpt.tracking import tracker

ABOUT = (
    "Pretrain a GPT, or resume a run. With --dry-run: print what would be trained, and from where, without training or "
    "writing anything; --dry-run=N: on N ranks."
)
# For train.deterministic, see hpcgpt.model.kernels.deterministic. cuBLAS and NCCL read their variables when they start:
# switches that add (NVLS) do so in no fixed order. Since 2.13 torch's options of the compiler are those of one thread,
# and backward passes on a GPU are compiled in another.
DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0", "TORCHINDUCTOR_DETERMINISTIC": "1"
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    began_at = time.time()
    if wanted := [argument for argument in argv if argument.partition("=")[0] == "--dry-run"]:
        return _dry_run([argument for argument in argv if argument not in wanted], wanted[-1].partition("=")[2])
    settings = _settings(argv)
    here = world.discover()
    streams.in_background()
    folder = settings.run_folder
    has_trained_before = _has_trained_with(settings)  # asked here, before this attempt replaces config.toml
    stop_file = folder / "STOP"
    # Before torch is loaded, which takes seconds: no signal may meet the default handler.
    flag = stop_signals.StopFlag(stop_file if here.is_first else None, settings.requeue.end_margin_s)
    flag.install()
    if here.is_first and (job := scontrol.job_id(os.environ)):
        job_end.watch(job, flag)
    try:
        layout.check(here, settings.run.device)
        if stop_file.exists():
            raise UserError(f"{stop_file} keeps this run stopped: remove it to continue")
        if here.is_first:
            tracker.check(settings.tracking.wandb)
            tracker.check_tensorboard(settings.tracking.tensorboard)
        # Imported late, so that --help loads neither numpy nor torch.
        from hpcgpt import plan

        planned = plan.make(settings, here.size, check_sizes=here.is_first)

        # Torch's warnings about sockets only repeat what our errors say better.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # Until the first step: imports leave no garbage, and to look for it takes a seventh of the time of torch's.
        gc.disable()
        if settings.train.deterministic:
            os.environ.update(DETERMINISTIC | os.environ)
        from hpcgpt.training import attempt

        gc.freeze()  # what the imports made stays until the end: it is never searched for garbage
        status = attempt.train(planned, here, flag, began_at)
    except Exception as error:
        ending: Exception = error
        if isinstance(error, InputError) and here.launcher == "srun" and has_trained_before:
            ending = as_node_error(error)
        _record_error(folder, here, ending)
        if here.size > 1 and not cli.wants_traceback():
            leave(cli.print_ending(ending))
        if ending is not error:
            raise ending from error
        raise
    if here.size > 1:
        leave(status)
    return status


def _settings(argv: Sequence[str]) -> Config:
    """Read the configuration. If the batch script could read it (HPCGPT_CHECKED), an error is this node's fault."""
    try:
        return sources.for_training(argv, "train", ABOUT)
    except UserError as error:
        if os.environ.get("HPCGPT_CHECKED", "") == world.job_start() != "":
            raise NodeError(f"{error} (the batch script could read it: {socket.gethostname()} cannot)") from error
        raise


def _dry_run(argv: Sequence[str], ranks: str) -> int:
    """Print what would be done, and do nothing. `ranks`: how many there would be; "": as many as were started."""
    from hpcgpt import preview

    settings = sources.from_command_line(argv, "train", ABOUT)
    here = world.discover()
    if ranks and (not ranks.isdecimal() or not int(ranks)):
        raise UserError(f"--dry-run={terminal.printable(ranks)}: expected a number of ranks")
    if here.is_first:
        for line in preview.lines(settings, int(ranks or here.size)):
            print(line)
    return 0


def _has_trained_with(settings: Config) -> bool:
    """Has the run made steps with the inputs of `settings`? config.toml has those of the attempt before."""
    if not run_folder.has_trained(settings.run_folder):
        return False
    try:
        before = tomllib.loads((settings.run_folder / "config.toml").read_text(encoding="utf-8"))["data"]
    except (OSError, KeyError, ValueError):  # unknown: assume that the inputs have not changed
        return True
    now = tomllib.loads(sources.to_toml(settings.from_anywhere))["data"]
    return all(before.get(key) == now.get(key) for key in ("dir", "mix", "tokenizer"))


def _record_error(folder: Path, here: World, error: Exception) -> None:
    """Write the error to the run folder, for the requeue policy and the crash report."""
    if not folder.is_dir():
        return
    status = status_of(error)
    crash_report.write(folder, here, error, status)
    # A rank that lost its connection does not have the reason: another rank does.
    if isinstance(error, ConnectionError) or not isinstance(error, UserError | OSError):
        return
    # exit.json belongs to the attempt that holds the lease; one that was refused only has its exit status.
    with suppress(OSError):  # this disk may be what has failed
        if here.is_first and not lease.is_held(folder):
            ended = run_folder.Exit(world.job_start(), status, sentence(error), 0, saved=False)
            run_folder.write_exit(folder, ended)


def leave(status: int) -> NoReturn:
    """End this process without finalizing the interpreter: a rank of several also after an error.

    gloo's threads may still hold Python objects. A thread that acquires the interpreter's lock during finalization ends
    the process with SIGABRT (docs/lab-notes.md), and then `srun -K` kills the other ranks. A command of one process
    saves the 0.2 s in which its memory would be freed. All output has been written.
    """
    streams.drain()
    os._exit(status)


if __name__ == "__main__":
    cli.run(main, leave)
