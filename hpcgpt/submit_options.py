"""The options of ``hpcgpt submit``, besides sbatch's flags (hpcgpt/slurm/sbatch_flags.py) and those of training."""

from __future__ import annotations

import argparse
import math

from hpcgpt.errors import UserError
from hpcgpt.slurm import sbatch_flags

HELP_AFTER = """
Any other flag of sbatch may be given under its own name, with = or without: --partition, --account, --time (24 hours,
or the longest that the partition allows), --mem, --cpus-per-task, --gres, --constraint, --exclude, --signal, ...

All other arguments are those of `hpcgpt train`; see `hpcgpt train --help`."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="hpcgpt submit",
        usage="hpcgpt submit [--nodes N] [flags of sbatch] [CONFIG] [--section.key value]...",
        description="Queue a training job on Slurm.",
        allow_abbrev=False,
        add_help=False,
    )
    slurm = made.add_argument_group("Slurm")
    slurm.add_argument(
        "--site", metavar="NAME", help="a cluster's site file: a name of `hpcgpt site list`, auto, or the path of one"
    )
    slurm.add_argument("--after", metavar="JOB", help="start when this job has ended, however it ends")
    slurm.add_argument(
        "--signal-lead-s", type=int, metavar="S",
        help="warn the ranks this long before the time limit, in seconds (default: 120)",
    )  # fmt: skip
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY[=VALUE]",
        help="a flag of sbatch that is not in sbatch(1), as a plugin of your site has; may be repeated",
    )  # fmt: skip
    slurm.add_argument(
        "--live", action="store_true",
        help="run the code and the configuration as they are at each start; by default, as they are now",
    )  # fmt: skip
    slurm.add_argument(
        "--grid", action="append", default=[], metavar="KEY=VALUE,...",
        help="queue a job array with a run for each value; may be repeated: for each combination",
    )  # fmt: skip
    slurm.add_argument(
        "--at-once", type=int, metavar="N", help="run at most N tasks of the array at a time (default: all)"
    )
    _add_before_and_after(slurm)
    # For --help only: sbatch_flags.split has taken them out before.
    slurm.add_argument("--nodes", metavar="N", help="nodes (default: 1)")
    slurm.add_argument(
        "--gpus-per-node",
        metavar="N",
        help="GPUs per node (default: all that the partition's nodes have; 0: CPUs only)",
    )
    slurm.add_argument("--ntasks-per-node", metavar="N", help="ranks per node (default: one for each GPU)")
    return made


def _add_before_and_after(group: argparse._ArgumentGroup) -> None:
    """Add what is asked and estimated before the job is queued, and what is shown of it afterwards."""
    group.add_argument(
        "--ask-above", type=_hours, metavar="HOURS",
        help="ask for confirmation of a job that would take more GPU hours, in all its starts (default: 1000)",
    )  # fmt: skip
    group.add_argument(
        "--yes", action="store_true", help="queue it, also if no configuration is named, or above --ask-above"
    )
    group.add_argument(
        "--dry-run", action="store_const", const="text",
        help="submit nothing; print the batch script, and on standard error an estimate of memory, time and disk; "
        "--dry-run=json: both as JSON",
    )  # fmt: skip
    group.add_argument(
        "--no-estimate", action="store_true", help="with --dry-run: leave the estimate out, which takes some seconds"
    )
    group.add_argument(
        "--gpu", default="", metavar="NAME",
        help="kind of GPU for the estimate, as for `hpcgpt estimate` (default: what Slurm or the site file names)",
    )  # fmt: skip
    group.add_argument(
        "--probe", action="store_true",
        help="with --dry-run: first have a job of some minutes train some steps, and estimate with what it measures",
    )  # fmt: skip
    group.add_argument("--probe-steps", type=int, metavar="N", help="steps of --probe (default: 30)")
    group.add_argument("--watch", action="store_true", help="then follow it, as `hpcgpt status --watch` does")
    group.add_argument("--json", action="store_true", help="print the job's id and run folder as JSON")


def further_flags(options: argparse.Namespace, written: sbatch_flags.Flags) -> sbatch_flags.Flags:
    """Return the flags of sbatch that our own options mean."""
    further: sbatch_flags.Flags = {}
    for pair in options.sbatch:
        key, _, value = pair.partition("=")
        further[key.lstrip("-")] = value
    if options.after:
        if "dependency" in written:
            raise UserError(f"--after {options.after} is --dependency=afterany:{options.after}: give one of the two")
        further["dependency"] = f"afterany:{options.after}"
    if options.signal_lead_s is not None:
        if "signal" in written:
            raise UserError("--signal-lead-s S is --signal=USR1@S: give one of the two")
        further["signal"] = f"USR1@{options.signal_lead_s}"
    return further


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = math.nan
    if not hours >= 0:  # also for nan
        raise argparse.ArgumentTypeError(f"expected a number of hours, not '{text}'")
    return hours
