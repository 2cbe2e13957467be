"""``python -m hpcgpt.train [CONFIG] [--section.key value]...``: pretrain, or resume a run.

This file is the command: which rank this is, what is requested, what can be checked before torch is loaded, and how
the process ends. An attempt is ``hpcgpt/training/attempt.py``, its loop ``hpcgpt/training/loop.py``, one step
``hpcgpt/training/step.py``.

Exit status: 0 training is finished; 75 saved before the end, please run me again; 76 another attempt has
taken over; 2 a mistake in what was asked; anything else is a failure.
"""

from __future__ import annotations

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
from hpcgpt.distributed import stop_signals, world
from hpcgpt.distributed.world import World
from hpcgpt.errors import InputError, NodeError, UserError, blame_the_node, sentence, status_of
from hpcgpt.output import streams
from hpcgpt.run import crash_report, run_folder
from hpcgpt.slurm import job_end, scontrol
from hpcgpt.storage import lease
from hpcgpt.tracking import tracker


def main(argv: Sequence[str]) -> int:
    began_at = time.time()
    settings = _settings(argv)
    here = world.discover()
    streams.in_background()
    folder = settings.run_folder
    has_trained_with_it = _has_trained_with(settings)  # now: this attempt writes a config.toml of its own
    stop_file = folder / "STOP"
    # Before the seconds that loading torch takes: a signal must never find the default handler.
    flag = stop_signals.StopFlag(stop_file if here.is_first else None, settings.requeue.end_margin_s)
    flag.install()
    if here.is_first and (job := scontrol.job_id(os.environ)):
        job_end.watch(job, flag)
    try:
        if stop_file.exists():
            raise UserError(f"{stop_file} keeps this run stopped: remove it to continue")
        if here.is_first:
            tracker.check(settings.tracking.wandb)
        # Late, so that --help costs neither numpy nor torch.
        from hpcgpt import plan

        planned = plan.make(settings, here.size, check_sizes=here.is_first)

        # Torch's own warnings about sockets say less than our errors do.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from hpcgpt.training import attempt

        status = attempt.train(planned, here, flag, began_at)
    except Exception as error:
        if isinstance(error, InputError) and here.launcher == "srun" and has_trained_with_it:
            node_error = blame_the_node(error)
            _say_why(folder, here, node_error)
            raise node_error from error
        _say_why(folder, here, error)
        raise
    if here.size > 1:
        _leave(status)
    return status


def _settings(argv: Sequence[str]) -> Config:
    """The configuration. The batch script has read the same one before it started this rank, or says nothing."""
    try:
        return sources.from_command_line(argv, "train", "Pretrain a GPT, or resume a run.")
    except UserError as error:
        if os.environ.get("HPCGPT_CHECKED", "") == world.job_attempt() != "":
            raise NodeError(f"{error} (the batch script could read it: {socket.gethostname()} cannot)") from error
        raise


def _has_trained_with(settings: Config) -> bool:
    """Has the run made steps with the inputs that are asked for now? config.toml names those of the attempt before."""
    if not run_folder.has_trained(settings.run_folder):
        return False
    try:
        before = tomllib.loads((settings.run_folder / "config.toml").read_text())["data"]
    except (OSError, KeyError, ValueError):  # not known: its shards were there at the first start
        return True
    now = tomllib.loads(sources.to_toml(settings.from_anywhere))["data"]
    return all(before.get(key) == now.get(key) for key in ("dir", "mix", "tokenizer"))


def _say_why(folder: Path, here: World, error: Exception) -> None:
    """Leave the reason in the run folder, for the requeue policy and for people."""
    if not folder.is_dir():
        return
    status = status_of(error)
    crash_report.write(folder, here, error, status)
    # Of a lost connection the reason is in the word of another rank.
    if isinstance(error, ConnectionError) or not isinstance(error, UserError | OSError):
        return
    # exit.json belongs to the attempt that holds the lease; one that was refused has only its exit status.
    with suppress(OSError):  # the disk that is full, or away, may be this one
        if here.is_first and not lease.is_held(folder):
            ended = run_folder.Exit(world.job_attempt(), status, sentence(error), 0, saved=False)
            run_folder.write_exit(folder, ended)


def _leave(status: int) -> NoReturn:
    """End this rank without tearing the interpreter down.

    gloo's threads may still hold Python objects, and a thread that asks for the interpreter while it is going
    away ends the process with SIGABRT (docs/lab-notes.md): then `srun -K` kills the ranks beside it.
    Everything is written by now.
    """
    streams.drain()
    os._exit(status)


if __name__ == "__main__":
    cli.run(main)
