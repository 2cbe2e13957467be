"""The estimate of a run: memory, time, disk, and what would make it fit. `make` puts it together.

No torch in here.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hpcgpt.config.options import Config
from hpcgpt.estimate import fitting, rates, schedule
from hpcgpt.estimate.account import Memory
from hpcgpt.estimate.devices import Device
from hpcgpt.estimate.fitting import Fitting
from hpcgpt.estimate.memory import Estimator
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.rates import Rate
from hpcgpt.estimate.request import MOST_MICRO_STEPS, Request
from hpcgpt.estimate.schedule import Disk, Times
from hpcgpt.plan import micro_steps
from hpcgpt.slurm import submission

RANKS_PER_NODE = 8  # where it is not known: GPUs of most nodes for training


@dataclass(frozen=True)
class Estimate:
    """What a run needs. `fits` is None where the device's memory is not known; `fittings` are for a run that does not.

    `times` is that of the steps that are left after the `done` ones. `rate` and `times` are None where nothing is known
    about the speed; `times` also if no step fits into the limit.
    """

    config: Config
    device: Device
    ranks: int
    micro_steps: int
    steps: int
    memory: Memory
    fits: bool | None
    fittings: tuple[Fitting, ...]
    rate: Rate | None
    times: Times | None
    limit_s: float | None
    disk: Disk
    done: int = 0

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.config.model.block_size

    @property
    def mfu(self) -> float | None:
        """Return the fraction of the GPUs' bf16 peak at the low rate."""
        peak = self.device.peak_flops
        return self.rate.low * self.memory.flops_per_token / (peak * self.ranks) if self.rate and peak else None

    def as_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON. Sizes are in bytes, times in seconds."""
        return {
            "run": str(self.config.run_folder),
            "device": self.device.name,
            "device_bytes": self.device.memory_bytes,
            "ranks": self.ranks,
            "parameters": self.memory.parameters,
            "flops_per_token": self.memory.flops_per_token,
            "steps": self.steps,
            "steps_done": self.done,
            "tokens": self.tokens,
            "tokens_per_step": self.tokens_per_step,
            "micro_steps": self.micro_steps,
            "memory": self.memory.as_dict(),
            "fits": self.fits,
            "would_fit": [
                {"flags": found.flags, "cost": found.cost, "peak_bytes": found.memory.peak.total}
                for found in self.fittings
            ],
            "tokens_per_s": asdict(self.rate) if self.rate else None,
            "mfu": self.mfu,
            "limit_s": self.limit_s,
            "time": self.times.as_dict() if self.times else None,
            "disk": asdict(self.disk) | {"is_enough": self.disk.is_enough},
        }


def make(
    config: Config,
    *,
    steps: int,
    ranks: int,
    device: Device,
    rate: Rate | None = None,
    limit_s: float | None = None,
    lead_s: float = submission.DEFAULT_LEAD_S,
    measured: Pace | None = None,
    done: int = 0,
    failure_s: float | None = None,
    save_s: float | None = None,
    ranks_per_node: int = 0,
    estimator: Estimator | None = None,
) -> Estimate:
    """Estimate a run of `steps` steps on `ranks` devices; `config` has its vocab_size (`hpcgpt.plan.make`).

    `rate`: measured for this run; else from the table. `limit_s`: the job's time limit; `lead_s` before it Slurm warns
    the job. `measured`: how long starts, saves and evaluations took before. `done`: steps that need not be made any
    more. `failure_s`: mean time between failures. `ranks_per_node`: 0 if it is not known, which is taken to be
    RANKS_PER_NODE. Takes some seconds.

    Raises:
        UserError: the batch cannot be divided.
    """
    config = _in_dtype_of(device, config)
    config = _in_groups(config, ranks, ranks_per_node or RANKS_PER_NODE)
    of_a_step = micro_steps(config.train.global_batch, config.train.micro_batch, ranks)
    request = Request(
        config, ranks, device.is_cpu, min(of_a_step, MOST_MICRO_STEPS),
        saves_while_training=0 < config.checkpoint.every < steps,
    )  # fmt: skip
    with nullcontext(estimator) if estimator else Estimator() as asked:
        memory = asked.ask(request)
        limit = device.memory_bytes
        fits = None if limit is None else memory.peak.total <= limit
        found = fitting.find(asked.ask, request, limit) if limit is not None and not fits else []
    if rate is None:
        rate = rates.from_table(device, memory.flops_per_token, ranks, config.train.dtype == "bfloat16")
    usual = schedule.habits(config, measured or Pace(0), ranks, memory.saved_bytes, failure_s, save_s)
    return Estimate(
        config, device, ranks, of_a_step, steps, memory, fits, tuple(found), rate,
        schedule.times(config, rate, max(0, steps - done), ranks, usual, limit_s, lead_s) if rate else None,
        limit_s, schedule.disk(config, steps, memory.saved_bytes), done,
    )  # fmt: skip


def _in_groups(config: Config, ranks: int, ranks_per_node: int) -> Config:
    """Return the configuration with the number of ranks that "node" means for parallel.shard_within."""
    if config.parallel.shard_within != "node":
        return config
    within = str(ranks_per_node) if ranks % ranks_per_node == 0 else "all"
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard_within=within))


def _in_dtype_of(device: Device, config: Config) -> Config:
    """Return the configuration with the dtype that `auto` means on a GPU; a CPU's is found where torch is loaded."""
    if config.train.dtype != "auto" or device.is_cpu:
        return config
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if device.has_bf16 else "float32"
    return dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
