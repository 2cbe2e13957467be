"""How long a run takes, in how many starts, and which checkpoints it keeps.

A start is one start of the job: from a requeue to the next time limit. The time of a run is that of its steps,
evaluations, waits for saves and starts, each with the save at its end. Checkpoints are advised every sqrt(2 s M)
seconds, with s the time of a save and M the mean time between failures (Young, "A first order approximation to the
optimum checkpoint interval", 1974): saving more often costs more time than the steps that a failure loses.

No torch in here.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from hpcgpt.checkpoint import listing
from hpcgpt.config.options import Config
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.rates import Rate
from hpcgpt.slurm import submission

# Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs (https://arxiv.org/abs/2407.21783, section 3.3.4).
GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
# Assumed where no attempt of the run has been measured.
START_S = 120.0
WRITE_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Habits:
    """What is known, or assumed, about a run's starts, saves and evaluations; `assumed` names what was not measured.

    `stall_s`: how much longer training takes because of a save in its background.
    """

    start_s: float
    save_s: float
    failure_s: float
    assumed: tuple[str, ...]
    eval_s: float = 0.0
    stall_s: float = 0.0


@dataclass(frozen=True)
class Times:
    """`seconds`: of the steps at the low rate; `fewest_s`: at the high one. `total_s`: with all else that takes time.

    `evaluations` and `saves` are counted, and take `evaluation_s` and `stalls_s` together. `gpu_hours`: of `total_s`.
    `starts`: of the job within its limit; `steps_per_start`: that fit into one. Without a limit 1, and all.
    `checkpoint_every`: the advised interval, in steps.
    """

    seconds: float
    fewest_s: float
    step_s: float
    evaluations: int
    evaluation_s: float
    saves: int
    stalls_s: float
    total_s: float
    gpu_hours: float
    starts: int
    steps_per_start: int
    checkpoint_every: int
    checkpoint_every_s: float
    habits: Habits

    @property
    def requeues(self) -> int:
        return self.starts - 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"requeues": self.requeues}


@dataclass(frozen=True)
class Disk:
    """`kept` checkpoints of `checkpoint_bytes` each at the end; `needed_bytes`: with the two that a save may add.

    `there_bytes`: those of the run's checkpoints that are there already, which need no more room. `free_bytes` in
    `folder`, the nearest that exists; None if it cannot be read.
    """

    checkpoint_bytes: int
    kept: int
    needed_bytes: int
    free_bytes: int | None
    folder: str
    there_bytes: int = 0

    @property
    def is_enough(self) -> bool | None:
        return None if self.free_bytes is None else self.needed_bytes - self.there_bytes <= self.free_bytes


def habits(
    config: Config, measured: Pace, ranks: int, saved_bytes: int, failure_s: float | None = None,
    save_s: float | None = None,
) -> Habits:  # fmt: skip
    """Return how long a start, a save and an evaluation take, as far as they were measured.

    `failure_s` and `save_s`, if given, are used instead.
    """
    assumed = []
    if measured.start_s is None:
        assumed.append(f"a start takes {START_S:.0f} s")
    if save_s is None and measured.save_s is None:
        assumed.append(f"a checkpoint is written at {WRITE_BYTES_PER_S / 1e9:g} GB/s")
    if config.eval.every and measured.eval_s is None:
        assumed.append("evaluations take no time: --probe measures them")
    if config.eval.tasks and config.eval.tasks_every:
        assumed.append("evaluations on eval.tasks take no time: they are not measured")
    if config.checkpoint.every and measured.stall_s is None:
        assumed.append("training does not wait for saves: --probe measures it")
    if failure_s is None:
        failure_s = GPU_HOURS_PER_FAILURE * 3600 / ranks
        assumed.append(f"a failure every {GPU_HOURS_PER_FAILURE:,.0f} GPU hours, as in the training of Llama 3")
    if save_s is None:
        save_s = saved_bytes / WRITE_BYTES_PER_S if measured.save_s is None else measured.save_s
    start_s = START_S if measured.start_s is None else measured.start_s
    return Habits(start_s, save_s, failure_s, tuple(assumed), measured.eval_s or 0.0, measured.stall_s or 0.0)


def times(
    config: Config, rate: Rate, steps: int, ranks: int, usual: Habits, limit_s: float | None = None,
    lead_s: float = submission.DEFAULT_LEAD_S,
) -> Times | None:  # fmt: skip
    """Return the time of `steps` steps; None if not even one fits into a start within `limit_s`.

    `lead_s`: how many seconds before its time limit Slurm warns the job, which ends the start.
    """
    tokens = config.train.global_batch * config.model.block_size
    step_s = tokens / rate.low
    seconds, fewest_s = steps * step_s, steps * tokens / rate.high
    evaluations, saves = _how_often(config, steps)
    evaluation_s, stalls_s = evaluations * usual.eval_s, saves * usual.stall_s
    each_s = (seconds + evaluation_s + stalls_s) / steps if steps else step_s
    starts, per_start = 1, steps
    if limit_s is not None:
        # A job stops at Slurm's warning, or before it if its end is too near (hpcgpt.distributed.stop_signals).
        margin_s = max(lead_s, config.requeue.end_margin_s, step_s + 2 * usual.save_s)
        per_start = min(steps, max(0, int((limit_s - usual.start_s - margin_s) / each_s)))
        if steps and not per_start:
            return None
        starts = max(1, math.ceil(steps / per_start)) if steps else 1
    # A save before a failure is worth nothing beyond the end of a start, where the run saves anyway.
    every_s = math.sqrt(2 * usual.save_s * usual.failure_s)
    every = max(1, min(round(every_s / each_s), per_start or 1))
    total_s = seconds + evaluation_s + stalls_s + starts * (usual.start_s + usual.save_s)
    return Times(
        seconds, fewest_s, step_s, evaluations, evaluation_s, saves, stalls_s, total_s, total_s * ranks / 3600,
        starts, per_start, every, every_s, usual,
    )  # fmt: skip


def _how_often(config: Config, steps: int) -> tuple[int, int]:
    """Return how many evaluations a run of `steps` steps makes, and how many saves in the background of training."""
    evaluations = -(-steps // config.eval.every) if config.eval.every else 0
    return evaluations, max(0, steps - 1) // config.checkpoint.every if config.checkpoint.every else 0


def kept_checkpoints(config: Config, steps: int) -> tuple[int, int]:
    """Return how many checkpoints a run of `steps` steps keeps, and how many there are at most, while it saves."""
    keep = config.checkpoint
    kept = keep.keep_last + (1 if keep.keep_best and config.eval.every else 0)
    if keep.keep_every:
        kept += steps // keep.keep_every
    made = 1 + (steps - 1) // keep.every if keep.every else 1
    kept = min(kept, made)
    # The one that is being written, and the one just saved, until it has been read back.
    return kept, min(kept + 2, made + 1)


def disk(config: Config, steps: int, saved_bytes: int) -> Disk:
    """Return the room that the checkpoints of a run of `steps` steps need."""
    kept, most = kept_checkpoints(config, steps)
    folder = config.run_folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        status = os.statvfs(folder)
        free: int | None = status.f_bavail * status.f_frsize
        there = listing.kept_bytes(config.run_folder / "checkpoints")
    except OSError:
        free, there = None, 0
    return Disk(saved_bytes, kept, most * saved_bytes, free, str(folder), there)
