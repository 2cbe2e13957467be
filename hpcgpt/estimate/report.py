"""An estimate as plain text for a terminal. Sizes are in GB of 10^9 bytes.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcgpt.estimate.account import PARTS
from hpcgpt.estimate.estimates import Estimate
from hpcgpt.output import terminal
from hpcgpt.output.counted import counted

_WIDTH = 24


def text(estimate: Estimate) -> str:
    """Return the estimate as a table of several lines."""
    return "\n".join([*_run(estimate), "", *_memory(estimate), "", *_time(estimate), "", *_disk(estimate)])


def _run(estimate: Estimate) -> Iterator[str]:
    yield _row("run", terminal.printable(str(estimate.config.run_folder)))
    yield _row("model", f"{estimate.memory.parameters:,} parameters")
    yield _row("device", f"{estimate.ranks} x {estimate.device.name}")
    yield _row(
        "length",
        f"{counted(estimate.steps, 'step')} of {estimate.tokens_per_step:,} tokens ({estimate.tokens / 1e9:,.3g} "
        "billion), "
        f"{counted(estimate.micro_steps, 'micro-step')} a rank",
    )
    if estimate.done:
        yield _row("", f"{counted(estimate.done, 'step')} done already: times are those of the others")


def _memory(estimate: Estimate) -> Iterator[str]:
    memory, peak = estimate.memory, estimate.memory.peak
    yield f"memory of a rank, at its fullest ({peak.phase})"
    for part in PARTS:
        yield _row(part, _gb(peak.parts[part]))
    room = estimate.device.memory_bytes
    verdict = "" if room is None else f" of {_gb(room)}: {'fits' if estimate.fits else 'does NOT fit'}"
    yield _row("all", _gb(peak.total) + verdict)
    if not estimate.device.is_cpu:
        yield _row("host memory", f"{_gb(memory.host_bytes)}, of which {_gb(memory.copied_bytes)} copy a checkpoint")
    yield _row("found by", memory.method)
    for remark in memory.remarks:
        yield _row("", terminal.printable(remark))
    if estimate.fits is False:
        yield from _fittings(estimate)


def _fittings(estimate: Estimate) -> Iterator[str]:
    if not estimate.fittings:
        yield _row("would fit", "nothing that was tried: use more ranks with fsdp, a smaller model, or larger GPUs")
    for number, found in enumerate(estimate.fittings):
        yield _row("" if number else "would fit", f"{_gb(found.memory.peak.total)} with {found.flags}")
        yield _row("", f"  at the cost of: {found.cost}")


def _time(estimate: Estimate) -> Iterator[str]:
    rate, times = estimate.rate, estimate.times
    if rate is None:
        yield _row("time", "not known: nothing was measured on this device, or in this dtype. Measure it: --probe;")
        yield _row("", "or give what you have measured: --rate TOKENS_PER_S, or --measured RUN_FOLDER")
        return
    low, high = f"{rate.low:,.0f}", f"{rate.high:,.0f}"
    speed = f"{low} tokens/s" + (f" to {high}" if high != low else "")
    yield _row("speed", speed + (f", MFU {estimate.mfu:.0%}" if estimate.mfu is not None else ""))
    for number, source in enumerate(rate.sources):
        yield _row("" if number else "measured by", terminal.printable(source))
    for address in rate.addresses:
        yield _row("", address)
    if rate.remark:
        yield _row("", rate.remark)
    if times is None:
        yield _row("time", f"no step fits into a time limit of {_span(estimate.limit_s or 0)}: ask for more")
        return
    fewest, most = _span(times.fewest_s), _span(times.seconds)
    between = f"{fewest} to " if fewest != most else ""
    yield _row("time", f"{between}{most} of training, {times.step_s:.3g} s a step")
    usual = times.habits
    if usual.eval_s and times.evaluations:
        evaluations = f"{counted(times.evaluations, 'evaluation')} of {usual.eval_s:.3g} s"
        yield _row("", f"{_span(times.evaluation_s)} in {evaluations}")
    if usual.stall_s and times.saves:
        yield _row("", f"{_span(times.stalls_s)} waiting for {counted(times.saves, 'save')}")
    ends = "start, with the save at its end" if times.starts == 1 else "starts, each with the save at its end"
    yield _row("", f"{_span(times.starts * (usual.start_s + usual.save_s))} for {times.starts:,} {ends}")
    yield _row("in all", f"{_span(times.total_s)} while the job runs" + (", at most" if between else ""))
    hours = f"{times.gpu_hours:,.1f}" if times.gpu_hours >= 1 else f"{times.gpu_hours:.2g}"
    yield _row("GPU hours" if not estimate.device.is_cpu else "rank hours", hours + (", at most" if between else ""))
    if estimate.limit_s is not None:
        yield _row(
            "starts",
            f"{times.starts:,} within a limit of {_span(estimate.limit_s)}: {counted(times.requeues, 'requeue')}, "
            "up to "
            f"{counted(times.steps_per_start, 'step')} each",
        )
    yield _row(
        "checkpoint.every",
        f"at most {counted(times.checkpoint_every, 'step')} is advised ({estimate.config.checkpoint.every:,} is "
        "set): a save of "
        f"{times.habits.save_s:.3g} s, a failure every {_span(times.habits.failure_s)}",
    )
    for number, assumed in enumerate(times.habits.assumed):
        yield _row("" if number else "assumed", assumed)


def _disk(estimate: Estimate) -> Iterator[str]:
    disk = estimate.disk
    kept = f"{counted(disk.kept, 'checkpoint')} of {_gb(disk.checkpoint_bytes)}"
    yield _row("disk", f"{_gb(disk.needed_bytes)}: {kept}, and those that a save has not yet replaced")
    if disk.free_bytes is not None:
        verdict = "" if disk.is_enough else ": NOT enough"
        there_bytes = min(disk.there_bytes, disk.needed_bytes)  # it may have kept more until now
        there = f"{_gb(there_bytes)} of it there already, " if there_bytes else ""
        yield _row("", f"{there}{_gb(disk.free_bytes)} free in {terminal.printable(disk.folder)}{verdict}")


def _row(name: str, value: str) -> str:
    return f"  {name:{_WIDTH - 2}}{value}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:,.0f} min"
    if seconds < 3 * 86_400:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 86_400:,.1f} days"
