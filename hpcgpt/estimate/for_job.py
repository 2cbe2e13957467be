"""The estimate of a job that is to be queued: of its ranks, on the GPUs that Slurm or a site file names.

No torch in here.
"""

from __future__ import annotations

from pathlib import Path

from hpcgpt.checkpoint import go_back
from hpcgpt.estimate import analytic, devices, estimates, rates, schedule
from hpcgpt.estimate.devices import Device
from hpcgpt.estimate.estimates import Estimate
from hpcgpt.estimate.probe import measure, pace, table
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.rates import Rate
from hpcgpt.plan import Plan
from hpcgpt.slurm import submission
from hpcgpt.slurm.partitions import minutes
from hpcgpt.slurm.request import Request

ASK_ABOVE_GPU_HOURS = 1000.0  # more than a node of 8 GPUs uses in five days


def make(planned: Plan, requested: Request, gpu: str) -> tuple[Estimate | None, str]:
    """Estimate the job; or return None, and why there is no estimate. `gpu`: a name of `hpcgpt estimate --gpu`, or "".

    Takes some seconds.

    Raises:
        UserError: `gpu` is not in the table.
    """
    try:
        device, rate, measured = _device_and_pace(planned, requested, gpu)
        if device is None:
            name = requested.gpu_type
            shown = f"'{name}', of which nothing is known" if name else "GPUs without a name"
            kinds = ", ".join(devices.DEVICES)
            return None, f"no estimate: Slurm lists {shown}; name the kind with --gpu, one of {kinds}"
        found = estimates.make(
            planned.config,
            steps=planned.total_steps,
            ranks=requested.ranks,
            device=device,
            rate=rate,
            limit_s=_limit_s(requested),
            lead_s=submission.lead_s(requested.flags),
            measured=measured,
            done=_done(planned),
            ranks_per_node=requested.ranks // requested.nodes,
        )
    except OSError as error:
        return None, f"no estimate: {error}"
    return found, ""


def gpu_hours(planned: Plan, requested: Request, gpu: str) -> tuple[float, str]:
    """Return about how many GPU hours the job takes, over all of its starts, and by what that is known.

    Where the speed is not known, it is one start until the time limit. Without the process that measures memory.
    """
    if not requested.gpus_per_node:
        return 0.0, "no GPUs are requested"
    config, limit_s = planned.config, _limit_s(requested)
    device, rate, measured = _device_and_pace(planned, requested, gpu)
    flops = analytic.flops_per_token(config.model)
    if rate is None and device is not None:
        rate = rates.from_table(device, flops, requested.ranks, device.has_bf16 and config.train.dtype != "float32")
    if rate is not None:
        saved = 12 * analytic.parameter_count(config.model)  # weights and two moments in float32
        usual = schedule.habits(config, measured, requested.ranks, saved)
        left = max(0, planned.total_steps - _done(planned))
        times = schedule.times(config, rate, left, requested.ranks, usual, limit_s, submission.lead_s(requested.flags))
        if times:
            gpus = max(requested.gpus_per_node * requested.nodes, requested.ranks)
            return times.gpu_hours * gpus / requested.ranks, f"at {rate.low:,.0f} tokens/s ({rate.sources[0]})"
    hours = (limit_s or 0.0) / 3600 * requested.gpus_per_node * requested.nodes
    return hours, "one start, until its time limit: the speed is not known"


def _device_and_pace(planned: Plan, requested: Request, gpu: str) -> tuple[Device | None, Rate | None, Pace]:
    """Return the device of the job, and what the newest probe of it measured, or earlier attempts of this run."""
    config = planned.config
    run_dir = Path(config.run.dir)
    if gpu:
        device: Device | None = devices.find(gpu)
    elif not requested.gpus_per_node or config.run.device == "cpu":
        device = devices.find(devices.CPU)
    else:
        device = devices.recognised(requested.gpu_type)
    measure.collect(run_dir)
    if probe := table.find(run_dir, config, requested.ranks, device, requested.nodes):
        device = device.sized_by(probe.on) if device else probe.on
        return device, rates.from_pace(probe.pace, str(probe)), probe.pace
    return device, None, pace.read(config.run_folder)


def _done(planned: Plan) -> int:
    """Return the step from which the job would continue."""
    state = go_back.state_to_continue_from(planned.config)
    return state.step if state else 0


def _limit_s(requested: Request) -> float | None:
    limit = minutes(requested.flags["time"])
    return 60.0 * limit if limit else None
