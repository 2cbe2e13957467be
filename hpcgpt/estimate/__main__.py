"""``python -m hpcgpt.estimate CONFIG --ranks N [--gpu NAME] [--probe]``: what a run would need.

Without --probe no GPU and no job is used. With it, some steps of the run are trained on this machine first, and
measured; ``hpcgpt submit --dry-run --probe`` does that in a job.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt import cli
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted
from hpcgpt.run import which_runs
from hpcgpt.slurm.partitions import minutes

if TYPE_CHECKING:
    from hpcgpt.estimate.devices import Device
    from hpcgpt.estimate.probe.pace import Pace
    from hpcgpt.estimate.rates import Rate

GPT2_IDS = 50_257  # GPT-2's vocabulary, which is the default of data_prep.make_shards
DEFAULT_GPU = "h100-80"


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        print("\nAll other arguments are those of `hpcgpt train`; see `hpcgpt train --help`.")
        return 0
    options, training = parser.parse_known_args(argv)
    own = {flag.removeprefix("--"): "" for action in parser._actions for flag in action.option_strings}
    settings = sources.from_command_line(training, "estimate", "", own)
    for name in ("ranks", "rate", "mtbf_hours", "save_s", "memory_gb"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} {value} must be greater than 0")
    if sum(map(bool, (options.probe, options.rate, options.measured))) > 1:
        raise UserError("--probe, --rate and --measured each say how fast the run is: give one of the three")
    if options.probe_steps is not None and not options.probe:
        raise UserError("--probe-steps has no effect without --probe")
    # Imported here, so that --help does not load numpy.
    from hpcgpt.checkpoint import go_back
    from hpcgpt.estimate import estimates, report

    config, steps, remarks = _planned(settings, options.ranks, options.probe)
    if options.probe:
        _probe(config, options)
    device, rate, measured = _device_and_pace(config, options, remarks)
    state = go_back.state_to_continue_from(config)
    found = estimates.make(
        config,
        steps=steps,
        ranks=options.ranks,
        device=device,
        rate=rate,
        limit_s=_limit_s(options.time or ""),
        measured=measured,
        done=state.step if state else 0,
        failure_s=options.mtbf_hours * 3600 if options.mtbf_hours else None,
        save_s=options.save_s,
    )
    if options.json:
        print(json.dumps(found.as_dict() | {"remarks": remarks}))
        return 0
    print(report.text(found))
    for remark in remarks:
        print(f"note: {remark}")
    return 0


def _probe(config: Config, options: argparse.Namespace) -> None:
    """Train some steps of the run on this machine, and keep how long they took in the table of probes."""
    from hpcgpt.estimate.probe import here, measure

    here.refuse_on_login_node(os.environ)
    prepared = measure.prepare(config, options.probe_steps)
    steps = prepared.config.train.steps
    print(
        f"training {counted(steps, 'step')} on {counted(options.ranks, 'rank')} here, in {prepared.folder}",
        file=sys.stderr,
        flush=True,
    )
    here.run(prepared, options.ranks)
    measure.collect(Path(config.run.dir), ending_s=0, own=prepared.folder)


def _device_and_pace(
    config: Config, options: argparse.Namespace, remarks: list[str]
) -> tuple[Device, Rate | None, Pace]:
    """Return the device, and what was measured of this run: as the flags say, else by the newest probe of it.

    Appends to `remarks` what is assumed.
    """
    from hpcgpt.estimate import devices, rates
    from hpcgpt.estimate.probe import measure, pace, table

    name = options.gpu or (devices.CPU if config.run.device == "cpu" else "")
    device = devices.find(name) if name else None
    if device and device.is_cpu and config.run.device == "cuda":
        raise UserError("--gpu cpu contradicts run.device cuda: leave one of them out")
    rate, measured = None, pace.read(config.run_folder)
    if options.rate:
        rate = rates.given(options.rate, "--rate")
    elif options.measured:
        folder = which_runs.one(options.measured, Path(config.run.dir))
        measured = pace.read(folder)
        rate = rates.from_pace(measured, str(folder))
    else:
        measure.collect(Path(config.run.dir))
        if probe := table.find(Path(config.run.dir), config, options.ranks, device):
            rate, measured = rates.from_pace(probe.pace, str(probe)), probe.pace
            device = device.sized_by(probe.on) if device else probe.on
    if device is None:
        device = devices.find(DEFAULT_GPU)
        remarks.append(f"--gpu is not given: {DEFAULT_GPU} is assumed")
    if options.memory_gb:
        device = dataclasses.replace(device, memory_gb=options.memory_gb)
    return device, rate, measured


def _limit_s(text: str) -> float | None:
    """Return the time limit in seconds, None without one."""
    limit = minutes(text) if text else 0
    if limit is None:
        raise UserError(f"--time {text}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    return 60.0 * limit or None


def _planned(settings: Config, ranks: int, trains: bool) -> tuple[Config, int, list[str]]:
    """Return the configuration with its vocabulary, the number of steps, and what was assumed.

    Shards need not exist yet, unless it `trains`: then the vocabulary is GPT-2's, unless model.vocab_size is given.
    """
    from hpcgpt import plan

    folders = [part.dir for part in settings.data.mix] or [settings.data.dir]
    missing = [folder for folder in folders if not (Path(folder) / "manifest.json").exists()]
    if trains or not missing:
        planned = plan.make(settings, ranks, check_sizes=False)
        return planned.config, planned.total_steps, list(planned.warnings)
    train = settings.train
    if not (train.steps or train.tokens):
        raise UserError(
            f"{missing[0]} has no shards, so the length of train.epochs is not known: make them first, or give "
            "--train.tokens or --train.steps"
        )
    plan.check_groups(settings.parallel.shard_within, ranks)
    plan.micro_steps(train.global_batch, train.micro_batch, ranks)
    ids = settings.model.vocab_size or GPT2_IDS
    changes: dict[str, Any] = {"model": dataclasses.replace(settings.model, vocab_size=ids)}
    steps = train.steps or math.ceil(train.tokens / (train.global_batch * settings.model.block_size))
    return dataclasses.replace(settings, **changes), steps, [f"{missing[0]} has no shards yet: {ids:,} ids are assumed"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpcgpt estimate",
        usage="hpcgpt estimate [--ranks N] [--gpu NAME] [CONFIG] [--section.key value]...",
        description="Estimate memory, time and disk of a run; without a GPU, unless --probe is given.",
        allow_abbrev=False,
        add_help=False,
    )
    own = parser.add_argument_group("estimate")
    own.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks, one for each GPU (default: 1)")
    own.add_argument(
        "--gpu", metavar="NAME", help=f"kind of GPU, or cpu (default: {DEFAULT_GPU}, if not run.device cpu)"
    )
    own.add_argument("--memory-gb", type=float, metavar="GB", help="memory of a rank, instead of the table's")
    own.add_argument("--time", metavar="LIMIT", help="the job's time limit, as for sbatch: counts requeues")
    own.add_argument("--rate", type=float, metavar="TOKENS_PER_S", help="measured rate of all ranks together")
    own.add_argument(
        "--measured",
        type=paths.not_empty,
        metavar="RUN",
        help="folder or name of a run: what its steps, evaluations, saves and starts took",
    )
    own.add_argument(
        "--probe", action="store_true",
        help="train some steps of the run on this machine, and measure them; kept in <run.dir>/probes.jsonl",
    )  # fmt: skip
    own.add_argument("--probe-steps", type=int, metavar="N", help="steps of --probe (default: 30)")
    own.add_argument("--mtbf-hours", type=float, metavar="H", help="mean time between failures of this job")
    own.add_argument("--save-s", type=float, metavar="S", help="time of a save")
    own.add_argument("--json", action="store_true", help="print the estimate as one JSON object")
    return parser


if __name__ == "__main__":
    cli.run(main)
